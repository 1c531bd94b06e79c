"""Which expertd this is: its release, and the commit that it was built from."""

RELEASE = "0.1.0"
REVISION = ""
"""The first digits of the commit, and ".dirty" for more than is in it, as the build says; a checkout says nothing."""
VERSION = f"{RELEASE}+g{REVISION}" if REVISION else RELEASE
