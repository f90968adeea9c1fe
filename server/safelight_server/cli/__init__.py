"""The command line."""

import os

# Set before grpc is imported, which reads it then. Its core writes plain lines to stderr, some caused by clients.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
