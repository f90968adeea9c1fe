"""The command line."""

import os

# Before grpc is imported, which looks at it then. Its core writes plain lines to stderr, and a client can cause some.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
