"""Every error the executor raises on purpose.

SplitpilotError
├── ConfigError        a setting, file or argument is wrong (commands exit with code 2)
│   └── ProfileError   a profile is unreadable or belongs to another model
├── HandshakeError     a node does not answer, or runs another model or other weights
├── WireError          a frame that cannot be accepted, with the reason
│   └── FrameDamaged   its checksum or length is wrong: it changed on its way
└── RequestError       one inference failed
    ├── RequestRefused   a bound was reached (back-pressure); nothing was run
    └── RequestTimeout   no answer before the request's deadline
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "FrameDamaged",
    "HandshakeError",
    "ProfileError",
    "RequestError",
    "RequestRefused",
    "RequestTimeout",
    "SplitpilotError",
    "WireError",
    "one_line",
]


class SplitpilotError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(SplitpilotError):
    """A setting, file or argument is wrong; the message says what was expected and what came."""


class ProfileError(ConfigError):
    """A profile is unreadable, or belongs to another model or chain."""


class HandshakeError(SplitpilotError):
    """A node does not answer, or runs another model or other weights."""


class WireError(SplitpilotError):
    """A frame cannot be accepted; the message names the field and the reason."""


class FrameDamaged(WireError):
    """A frame's checksum or length is wrong: it changed on its way, and may be sent again."""


class StageAbandoned(SplitpilotError):
    """A stage was not run to its end: nobody wants its output any more."""


class RequestError(SplitpilotError):
    """One inference failed; the next one may work."""


class RequestRefused(RequestError):
    """A queue bound was reached; the request was not run.

    Attributes:
        wait_s: Seconds after which to try again; until then the client refuses requests of the same
            plan itself. 0 where nobody said.
    """

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class RequestTimeout(RequestError):
    """No answer arrived before the request's deadline."""


def one_line(error: Exception) -> str:
    """The error's message on one line, of readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."
