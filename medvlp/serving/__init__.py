"""The prototypes of a run for people and mining jobs: files, gallery, FAISS export, read-only gRPC server."""
