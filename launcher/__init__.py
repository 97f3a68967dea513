"""The `medvlp` command: local launching of everything the library offers."""
