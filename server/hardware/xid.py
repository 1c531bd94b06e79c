"""What the driver's Xid numbers mean: NVIDIA's "Xid Errors" catalogue, those after which a GPU is not to be used."""

from __future__ import annotations

FATAL = {
    46: "the GPU stopped processing",
    48: "memory had an uncorrectable (double-bit) ECC error",
    62: "its microcontroller halted",
    64: "a row of its memory could not be remapped or a page not retired",
    74: "NVLink had an error",
    79: "the GPU has fallen off the bus",
    94: "memory had a contained ECC error",
    95: "memory had an uncontained ECC error",
    119: "its system processor (GSP) does not answer",
    120: "its system processor (GSP) failed",
    136: "NVLink could not be trained",
    140: "memory had an unrecovered ECC error",
    143: "the GPU could not be initialised",
}
"""Others are faults of programs (13, 31, 43, 45), which the device's own errors tell of, or only worth a note."""
