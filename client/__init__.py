"""Coordinators, and the programs made of them. Servers have nothing from here.

gRPC's core writes to standard error on its own, a line for each connection that a server ends, at the level that the
environment has when it is imported. What there is to say to callers expertd says, with its own log; who wants to hear
gRPC as well sets the variable. Servers leave it alone: it is gRPC that knows why a TLS handshake failed.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
