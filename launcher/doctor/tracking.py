"""Weights & Biases: reachable, or offline."""

from __future__ import annotations

import os
import urllib.error
import urllib.request

from launcher.doctor.results import Result, ok, warn

_SECONDS = 5.0


def check_tracking(mode: str = "auto") -> Result:
    """Ask W&B's server for a page when the run would log online (proxies of the environment are used).

    Args:
        mode: `monitor.wandb`.
    """
    from medvlp.training.wandb_run import resolve_mode

    resolved = resolve_mode(mode)
    if resolved == "disabled":
        return ok("W&B", "disabled")
    if resolved == "offline":
        return ok(
            "W&B", "offline (no API key): later, where there is a network: wandb sync RUN/wandb/offline-run-*"
        )
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not url.startswith(("http://", "https://")):
        return warn(
            "W&B", f"WANDB_BASE_URL={url} is no web address", "correct it, or set monitor.wandb=offline"
        )
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        return warn(
            "W&B", f"{url} cannot be reached ({reason}); runs go on, logged offline",
            "set monitor.wandb=offline on this cluster and sync later, or set HTTPS_PROXY",
        )  # fmt: skip
    return ok("W&B", f"{url} answers")
