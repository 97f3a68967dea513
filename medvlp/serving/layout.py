"""What lies where in `RUN/prototypes/`, and the error of what should lie there."""

from pathlib import Path

from shards.errors import MedvlpError

#: Folder of a run that holds everything of this package.
FOLDER = "prototypes"
#: Clusters and embeddings; and what lies in each cluster, for people.
SNAPSHOT, REPORT = "prototypes.safetensors", "report.json"
#: Folder with a page of contact sheets, and that page.
GALLERY, PAGE = "gallery", "index.html"
#: The server's token, for its owner alone; and where the server is, without the token.
TOKEN, ADDRESS = "token", "server.json"
#: Largest file of an address, in bytes.
ADDRESS_LIMIT = 1 << 16
#: Under what the address of a server that a user has started, and whether it speaks TLS, is remembered
#: (`medvlp.trust`).
SERVER = "server"


class PrototypeFilesError(MedvlpError):
    """What a run's folder `prototypes/` holds, or should hold, cannot be used."""

    exit_code = 4


class DamagedFileError(PrototypeFilesError):
    """A file is there, was read, and is not as this version writes it: it can only be made anew."""


def folder_of(run: Path) -> Path:
    """`RUN/prototypes`."""
    return run / FOLDER
