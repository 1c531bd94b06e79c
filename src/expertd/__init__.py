"""expertd: expert-parallel Mixture-of-Experts as a service."""

__version__ = "0.1.0"
