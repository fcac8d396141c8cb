"""CURVE keys for a cluster: `python -m executor.keys --cluster cluster.toml`.

Makes `NAME.key` (public) and `NAME.key_secret` (0600, in a folder that is 0700) for the client and
for every node, in the form that `zmq.auth` reads, and never overwrites one. `--add NAME` makes one
more key, `--list` shows fingerprints and expiry dates. Who may talk to a node is not decided by
the folder but by the node's allow-list in the cluster file (`executor.cluster.Cluster.allowed`).
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import difflib
import hashlib
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
import zmq.auth
from zmq.utils import z85

from executor.arguments import Parser
from executor.cluster import KEY_NAME, Cluster
from executor.errors import ConfigError

__all__ = ["AllowList", "PublicKey", "load_public", "load_secret", "main", "make_key"]

_log = logging.getLogger(__name__)

_METADATA = re.compile(r'^\s*expires\s*=\s*"?([^"\s]*)"?\s*$', re.MULTILINE)
_KEY_BYTES = 32
_MAX_DAYS = 36_500


@dataclass(frozen=True)
class PublicKey:
    """One public key.

    Attributes:
        name: Whose it is: the file's name without `.key`.
        z85: The key as ZeroMQ writes it, 40 characters.
        expires: When it stops being accepted (UTC); None for never.
    """

    name: str
    z85: bytes
    expires: datetime.datetime | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the key's 32 bytes, in base64, to compare over another channel."""
        digest = hashlib.sha256(z85.decode(self.z85)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def expired(self, now: datetime.datetime) -> bool:
        """Whether it is past its date."""
        return self.expires is not None and now >= self.expires


class AllowList:
    """The keys a node admits: what `zmq.auth` asks about every connection (`callback`)."""

    def __init__(self, keys: Iterable[PublicKey]) -> None:
        """Admit these keys, each until it expires."""
        self._keys = {key.z85: key for key in keys}

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the holder of public key `key` (z85) may connect now."""
        known = self._keys.get(key)
        if known is None:
            return False
        if known.expired(_now()):
            _log.warning("refused %s: its key expired on %s", known.name, known.expires)
            return False
        return True


def make_key(folder: Path, name: str, expires: datetime.datetime | None = None) -> PublicKey:
    """Make a key pair: NAME.key and NAME.key_secret.

    Raises:
        ConfigError: A file of that name is there already, or the folder cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make folder {folder}: {error.strerror}") from None
    public, secret = zmq.curve_keypair()
    date = f'    expires = "{expires.isoformat(timespec="seconds")}"\n' if expires else ""
    text = f'metadata\n    name = "{name}"\n{date}curve\n    public-key = "{public.decode()}"\n'
    # The secret first: it may not be there already, and without it the public file is of no use.
    _write_new(
        folder / f"{name}.key_secret",
        f"#   SECRET key: stays on one machine, mode 0600.\n{text}"
        f'    secret-key = "{secret.decode()}"\n',
        0o600,
    )
    try:
        _write_new(folder / f"{name}.key", f"#   Public key.\n{text}", 0o644)
    except ConfigError:
        (folder / f"{name}.key_secret").unlink()
        raise
    return PublicKey(name, public, expires)


def load_public(folder: Path, name: str) -> PublicKey:
    """Read NAME.key.

    Raises:
        ConfigError: It is missing, unreadable, writable by others or past its date.
    """
    path = folder / f"{name}.key"
    _check_writers(folder)
    _check_writers(path, missing=_missing(folder, name))
    return _parse(path, name)[0]


def load_secret(folder: Path, name: str) -> tuple[PublicKey, bytes]:
    """Read NAME.key_secret; returns the public part and the secret key in z85.

    Raises:
        ConfigError: It is missing, unreadable, readable by others or past its date.
    """
    path = folder / f"{name}.key_secret"
    _check_writers(folder)
    status = _check_writers(path, missing=f"no secret key {path}; {_hint(folder)}")
    if status.st_uid == os.geteuid():
        shared, wanted = 0o077, "600"
    else:
        # Where root hands a service its key (a container's mounted secret): group may read.
        shared, wanted = 0o027, "640"
        if status.st_uid != 0:
            raise ConfigError(f"secret key {path} belongs to user {status.st_uid}; chown it")
    if status.st_mode & shared:
        raise ConfigError(
            f"secret key {path} can be read by others (mode {stat.S_IMODE(status.st_mode):o}); "
            f"chmod {wanted} it, and make a new key if anybody else may have read it"
        )
    key, secret = _parse(path, name)
    if secret is None:
        raise ConfigError(f"{path} holds no secret key; {_hint(folder)}")
    return key, secret


def _parse(path: Path, name: str) -> tuple[PublicKey, bytes | None]:
    """Read a key file that may be read."""
    try:
        public, secret = zmq.auth.load_certificate(path)
        text = path.read_text(encoding="utf-8")
        for value in (public, secret):
            if value is not None and len(z85.decode(value)) != _KEY_BYTES:
                raise ValueError(f"a key is {_KEY_BYTES} bytes in z85")
        date = _METADATA.search(text)
        expires = _date(date[1]) if date else None
    except (OSError, ValueError, KeyError, IndexError, zmq.ZMQError) as error:
        raise ConfigError(f"{path} is no readable CURVE key ({error}); make a new one") from None
    key = PublicKey(name, public, expires)
    if key.expired(_now()):
        raise ConfigError(
            f"key {path} expired on {expires}; make and hand out a new one (SECURITY.md, rotation)"
        )
    return key, secret


def _date(text: str) -> datetime.datetime:
    value = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return value if value.tzinfo else value.replace(tzinfo=datetime.timezone.utc)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _check_writers(path: Path, missing: str = "") -> os.stat_result:
    """Refuse a file or folder that others could replace; returns its status."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(missing or f"keys_dir {path} is not readable: {error}") from None
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"{path} can be changed by others (mode {stat.S_IMODE(status.st_mode):o}); "
            f"chmod go-w it"
        )
    return status


def _missing(folder: Path, name: str) -> str:
    """What to say where NAME.key is not there: most often its name is misspelt."""
    known = sorted(path.stem for path in folder.glob("*.key"))
    near = difflib.get_close_matches(name, known, 1)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    there = ", ".join(known) or "none"
    return f"no key {name}.key in {folder} (there: {there}){guess or '; ' + _hint(folder)}"


def _hint(folder: Path) -> str:
    return f"make keys with `python -m executor.keys --cluster FILE --out {folder}`"


def _write_new(path: Path, text: str, mode: int) -> None:
    """Write a file that must not exist yet."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, mode)
            file.write(text)
            file.flush()
            os.fsync(descriptor)
    except FileExistsError:
        raise ConfigError(f"{path} is there already and is not overwritten") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _make(folder: Path, names: Sequence[str], expires: datetime.datetime | None) -> None:
    """Make keys for all of `names`, or for none if one is there already."""
    there = [n for n in names if any((folder / f"{n}.{s}").exists() for s in ("key", "key_secret"))]
    if there:
        raise ConfigError(
            f"{folder} holds keys of {', '.join(there)} already, which are not overwritten; "
            f"give another --out"
        )
    for name in names:
        print(f"{name:<16} {make_key(folder, name, expires).fingerprint}")


def _list(folder: Path, cluster: Cluster) -> None:
    """Print each key: name, fingerprint, date, and the nodes that accept it."""
    _check_writers(folder)
    names = (cluster.client, *(node.name for node in cluster.nodes))
    accepted: dict[str, list[str]] = {name: [] for name in names}
    for node in cluster.nodes:
        for name in cluster.allowed(node):
            accepted.setdefault(name, []).append(node.name)
    for name in sorted(accepted.keys() | {p.stem for p in folder.glob("*.key")}):
        try:
            key = load_public(folder, name)
            what = f"{key.fingerprint}  {key.expires or 'no expiry'}"
        except ConfigError as error:
            what = f"UNUSABLE: {error}"
        by = ", ".join(accepted.get(name, [])) or "nobody"
        print(f"{name:<16} {what}  accepted by: {by}")


def _say_where(folder: Path, cluster: Cluster) -> None:
    """Print which files each machine needs."""
    print(f"\nin {folder}; copy to each machine's keys_dir only:")
    print(f"  {cluster.client} (agent): {cluster.client}.key_secret, {cluster.nodes[0].name}.key")
    for i, node in enumerate(cluster.nodes):
        dialled = [*cluster.nodes[i + 1 : i + 2], *filter(None, [cluster.direct_target(i)])]
        public = [*cluster.allowed(node), *(n.name for n in dialled)]
        files = [f"{node.name}.key_secret", *(f"{name}.key" for name in public)]
        print(f"  {node.name}: {', '.join(files)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Make or list keys; returns the exit code."""
    parser = Parser(
        prog="python -m executor.keys", description="Make or list a cluster's CURVE keys."
    )
    parser.add_argument("--cluster", required=True, type=Path, help="cluster.toml")
    parser.add_argument("--out", type=Path, help="folder (default: the cluster file's keys_dir)")
    parser.add_argument("--add", metavar="NAME", help="make only this key, say for one more client")
    parser.add_argument("--days", type=int, help="the keys expire after so many days")
    parser.add_argument("--list", action="store_true", help="show the keys there are")
    args = parser.parse_args(argv)
    try:
        if args.days is not None and not 1 <= args.days <= _MAX_DAYS:
            raise ConfigError(f"--days must be in 1..{_MAX_DAYS}, got {args.days}")
        if args.list and (args.add or args.days):
            raise ConfigError("--list makes no keys; leave out --add and --days")
        if args.add is not None and not KEY_NAME.fullmatch(args.add):
            raise ConfigError(f"--add: a name is letters, digits, '_', '.', '-', got {args.add!r}")
        cluster = Cluster.load(args.cluster)
        folder = args.out or (Path(cluster.keys_dir) if cluster.keys_dir else None)
        if folder is None:
            raise ConfigError(f"{args.cluster} has no keys_dir; set one, or give --out")
        if args.list:
            _list(folder, cluster)
            return 0
        expires = _now() + datetime.timedelta(days=args.days) if args.days else None
        if args.add is not None:
            _make(folder, [args.add], expires)
            print(f"\ncopy {args.add}.key to each node that lists it under allow = [...]")
        else:
            _make(folder, [cluster.client, *(node.name for node in cluster.nodes)], expires)
            _say_where(folder, cluster)
    except ConfigError as error:
        print(f"executor.keys: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
