"""Messages and stubs of `prototypes.proto`, made by grpcio-tools (see README.md of the folder above)."""
