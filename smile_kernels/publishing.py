"""Files and folders that are written atomically and replace only what smile-kernels wrote.

A folder `out` is written in these steps. After an interruption, a later run continues or cleans up:

    .out.lock           locked while a process writes `out`; released by the kernel when that process ends
    out.partial/        the work folder: settings.json, files of the job for a restart, and output/
    out.partial/output  gets its manifest, then is renamed to `out`
    .out.old-*          with `force`, the output gets this name, then both are exchanged and the replaced one is deleted

The manifest, smile_manifest.json, lists a hash of the settings and the files written by smile-kernels, with a hash of
each. `force` replaces a folder only if it contains exactly these files.
"""

import contextlib
import errno
import fnmatch
import functools
import glob
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import stat
import time
import uuid
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import __version__
from .errors import SmileError, naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "MANIFEST",
    "OutputFolder",
    "check_folder",
    "check_outputs",
    "fingerprint",
    "is_path",
    "is_utf8",
    "marked",
    "missing_files",
    "new_file",
    "output_folder",
    "paths",
    "read_user_file",
    "restore",
    "user_file",
    "work_folder",
    "write_plot",
    "write_report",
    "write_text",
]

MANIFEST = "smile_manifest.json"
_MARK = "smile_kernels"  # a key of every report, by which it is recognised: the version that wrote it
SETTINGS = "settings.json"
_WRITES = "writes"
_ANY_FILE = ("layers/*", "output/*")  # of a work folder
_TEMPORARY = re.compile(r"(^|/)\.([^/]+)\.[0-9a-f]{12}$")  # a name of `new_file`
_FIRST_TEMPORARY = 0x5311E0000000  # the number in the first such name
LONGEST_NAME = 255 - len("..0123456789ab")  # bytes of a file name that has such a temporary one
_LARGEST_REPORT = 1 << 28  # bytes of a file that is read to know whether it is a report
_OF_PLOTS = b"smile_kernels.publishing.write_plot"  # in the metadata of every plot, by which it is recognised
_SETTLED = 2_000_000_000  # nanoseconds after which a further change gives a file another time, on any file system


def check_outputs(
    inputs: Iterable[str | Path] = (),
    keys: Collection[str] | None = None,
    *,
    plot: Path | None = None,
    **files: Path | None,
) -> None:
    """Check output files by name before any work: they can be written, replace their like, and a plot can be drawn.

    Args:
        inputs: files and folders that are read: no output file may be one of them, or inside one.
        keys: those of the report that each of `files` gets, see `marked`, first one that is always there; None: any
            file is replaced.
        plot, files: the output files by name, all different.

    Raises:
        SmileError: a file cannot be written; the message names it.
    """
    read = [Path(os.path.realpath(place)) for place in inputs]
    names: dict[Path, str] = {}
    for name, file in {"plot": plot, **files}.items():
        if file is None:
            continue
        if not is_path(file):
            raise SmileError(f"{name}: is {str(file)!r}; expected a path that a file can have")
        if not os.path.isdir(file.absolute().parent):
            raise SmileError(f"{name}: is {str(file)!r}; expected a file in a folder that exists")
        if os.path.isdir(file):
            raise SmileError(f"{name}: is {str(file)!r}, a folder; expected a file")
        try:
            target = _target(file)
        except SmileError as error:
            raise SmileError(f"{name}: {error}") from None
        if len(os.fsencode(target.name)) > LONGEST_NAME:
            raise SmileError(f"{name}: is {str(target)!r}; expected a name of at most {LONGEST_NAME} bytes")
        if not os.access(target.parent, os.W_OK):
            raise SmileError(f"{name}: is {str(file)!r}; expected a file in a folder that can be written")
        target = Path(os.path.realpath(target))
        if source := next((place for place in read if place in (target, *target.parents)), None):
            where = "an input" if source == target else f"inside the input {source}"
            raise SmileError(f"{name}: is {str(file)!r}, {where}; expected a file outside of it")
        if (other := names.setdefault(target, name)) != name:
            raise SmileError(f"{name}: is {str(file)!r}, as {other} is; expected another file")
        if name == "plot" or keys is not None:
            _check_like(name, target, None if name == "plot" else keys)
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):
        raise SmileError(f"plot: is {str(plot)!r}; expected a name that ends with .png, .svg or .pdf")
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise SmileError(f"plot: is {str(plot)!r}, and matplotlib is not installed; expected it, to draw the plot")


def _check_like(name: str, file: Path, keys: Collection[str] | None) -> None:
    """Refuse to replace a file with content, unless it is a marked report with these keys alone, or with None a plot.

    The report must have the first of the keys; those of other versions may lack others.
    """
    if not file.exists() or not (size := file.stat().st_size):
        return
    like = size <= _LARGEST_REPORT and os.access(file, os.R_OK)
    if keys is None:
        like = like and _OF_PLOTS in file.read_bytes()
    else:
        found = _read_object(file) or {} if like else {}
        like = {_MARK, next(iter(keys))} <= found.keys() <= {_MARK, *keys}
    if not like:
        what = "a plot by smile-kernels" if keys is None else f"a report by smile-kernels with {', '.join(keys)}"
        raise SmileError(f"{name}: is {str(file)!r}, which is not {what}; expected a new file, or one to replace")


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON, atomically; a file at this path is replaced only if it is one with these keys."""
    check_outputs(keys=report.keys(), path=Path(path))
    write_text(Path(path), json.dumps(marked(report), indent=1) + "\n")


def marked(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with the key by which `check_outputs` recognises it."""
    return {_MARK: __version__, **report}


def write_plot(file: str | Path, figure: Any, **options: Any) -> None:
    """Write a figure of matplotlib atomically, in the format of the file's suffix; `options` are those of savefig.

    Its metadata have what `check_outputs` recognises.
    """
    drawn = io.BytesIO()  # its writer for PDF raises further exceptions after that of a full disk
    metadata = {"Creator": _OF_PLOTS.decode()}
    figure.savefig(drawn, format=Path(file).suffix.removeprefix(".") or "png", metadata=metadata, **options)
    with new_file(Path(file)) as f:
        f.write(drawn.getbuffer())


@contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
    """Open a binary file that gets its name when it is complete and flushed to disk. Links are followed.

    Raises:
        SmileError: a device, a pipe or a folder has this name.
        OSError: the disk is full, or a device error; no partial file is left.
    """
    file = _target(file)
    try:
        with naming(file), _open_temporary(file) as f:
            try:
                yield f
                f.flush()
                os.fsync(f.fileno())
                os.replace(f.name, file)
            except BaseException:
                Path(f.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(file.parent).free
            raise OSError(
                error.errno, f"disk is full ({free:,} bytes free); no half-written file is left", str(file)
            ) from None
        raise


def _open_temporary(file: Path) -> IO[bytes]:
    """Open the file that gets the name of `file` when it is complete.

    It is locked while it is written, so that one that a killed process left is found and used again.
    """

    def take(path: str, _: int) -> int:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        is_new = not os.path.lexists(path)
        descriptor = os.open(path, flags | os.O_CREAT | (os.O_EXCL if is_new else 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or not _lock(descriptor, Path(path)):
                raise FileExistsError
            os.ftruncate(descriptor, 0)
        except BaseException as error:
            os.close(descriptor)
            if is_new and not isinstance(error, (BlockingIOError, FileExistsError)):  # else another process has it
                os.unlink(path)
            raise
        return descriptor

    if fcntl is not None:
        for number in range(_FIRST_TEMPORARY, _FIRST_TEMPORARY + 10):  # more where several processes write one file
            path = file.with_name(f".{file.name}.{number:012x}")
            try:
                return open(path, "wb", opener=take)
            except OSError:
                if not os.path.lexists(path):  # not even created
                    break
    return open(file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}"), "xb")


def _target(file: Path) -> Path:
    """The file that a new one replaces: `file`, or where a link leads; not for a stream such as /dev/stdout."""
    if not is_path(file):
        raise SmileError(f"{str(file)!r}: is not a path that a file can have; expected one without a null character")
    target = Path(os.path.realpath(file)) if os.path.islink(file) else file
    stream = target is not file and Path(os.path.realpath(file.parent)).parts[1:2] in (("dev",), ("proc",))
    if stream or (os.path.lexists(target) and not target.is_file()):
        raise SmileError(f"{file}: is not a regular file; expected a new file, or one to replace")
    return target


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with new_file(file) as f:
        f.write(text.encode())


def user_file(variable: str, default: str, name: str) -> Path:
    """A file of this package for each user, in the folder that an environment variable names, by default ~/`default`.

    Raises:
        SmileError: the variable is not set, and the user has no home folder.
    """
    try:
        folder = os.environ.get(variable) or Path.home() / default
    except RuntimeError:
        raise SmileError(f"{variable}: is not set, and the user has no home folder; expected a folder") from None
    return Path(folder) / "smile_kernels" / name


def read_user_file(variable: str, default: str, name: str, replaces: bool = False) -> str | None:
    """The text of a file of `user_file`; None if there is none, or, with a warning, if the user may not read it.

    With `replaces`, what the caller writes there contains this text: a file that cannot be read raises SmileError.
    """
    try:
        file = user_file(variable, default, name)
    except SmileError:
        return None
    try:
        if file.exists() and not file.is_file():  # a pipe would block
            raise OSError(errno.EINVAL, "expected a regular file")
        return file.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if replaces:
            raise SmileError(
                f"{file}: cannot be read ({error.strerror}); expected a file that can, to add to it"
            ) from None
        warnings.warn(f"{file}: is not used, since it cannot be read ({error.strerror})", stacklevel=3)
        return None


@dataclass(frozen=True)
class OutputFolder:
    """An output folder being written.

    Attributes:
        folder: path of the output, with symbolic links resolved.
        settings: everything that the result depends on.
        writes: patterns of the files that the job writes in the work folder.
        replaces: whether a folder written by smile-kernels is at this path and may be replaced.
        complete: whether `folder` is already the complete result of these settings.
    """

    folder: Path
    settings: Mapping[str, Any]
    writes: Sequence[str] = _ANY_FILE
    replaces: bool = False
    complete: bool = False

    @property
    def work(self) -> Path:
        return work_folder(self.folder)

    @property
    def output(self) -> Path:
        return self.work / "output"

    def publish(self) -> None:
        """Rename the finished `output` to `folder` and remove the work folder.

        Raises:
            FileExistsError: something else is now at `folder`; `output` is kept.
        """
        _check_work(self.work, self.writes)
        _write_manifest(self.output, self.settings)
        old = self.folder.with_name(f".{self.folder.name}.old-{uuid.uuid4().hex[:12]}")
        try:
            if self.replaces:
                _check_replaceable(self.folder, force=True)
                os.rename(self.output, old)
                _exchange(old, self.folder)
            else:
                os.rename(self.output, self.folder)  # fails unless the folder is absent or empty
        except OSError as error:
            if not error.strerror:  # of the check
                raise
            if old.exists() and not self.output.exists():
                os.rename(old, self.output)
            raise FileExistsError(
                f"{self.folder}: cannot be written ({error.strerror}); the finished output is kept in {self.output}"
            ) from None
        _sync_folder(self.folder.parent)
        self.discard()
        if self.replaces:
            _remove_old(old)

    def discard(self) -> None:
        """Delete the work folder, its settings last, so that it is recognised after an interruption.

        Raises:
            FileExistsError: it contains files that the job did not write. Nothing is deleted then.
        """
        _check_work(self.work, self.writes)
        _remove(self.work, last=SETTINGS)


def _exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders: atomically, or in three steps where the file system cannot."""
    import ctypes

    with contextlib.suppress(AttributeError):  # a C library without it
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if ctypes.CDLL(None).renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
            return
    between = one.with_name(f"{one.name}-1")
    os.rename(other, between)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(between, other)
        raise
    os.rename(between, one)


def restore(folder: Path) -> None:
    """Give a folder its name again that it lost where a replacement was interrupted in between."""
    if not folder.exists() and folder.parent.is_dir():
        with _locked(folder):
            _restored(folder)


def _restored(folder: Path) -> list[Path]:
    """The old folders next to `folder`; where that is missing, the replaced one is renamed to it."""
    found = sorted(folder.parent.glob(f".{glob.escape(folder.name)}.old-*"), reverse=True)  # *-1 is the replaced one
    named = [old for old in found if re.search(r"\.old-[0-9a-f]{12}(-1)?$", old.name)]  # others are the user's
    olds = [old for old in named if _wrote(old) or _empty(old)]
    if not folder.exists() and (whole := [old for old in olds if _wrote(old) and not missing_files(old)]):
        os.rename(whole[0], folder)
        olds.remove(whole[0])
    return olds


def work_folder(folder: Path) -> Path:
    """Path of the intermediate files of an output folder."""
    return folder.with_name(f"{folder.name}.partial")


def check_folder(folder: str | Path, *, inputs: Mapping[str, str | Path] | None = None) -> Path:
    """The path of an output folder, with symbolic links resolved.

    Args:
        folder: path of the output.
        inputs: the folders that are read, by argument name. The output may not be, contain or be inside any of them,
            nor may they be among its intermediate files.

    Raises:
        ValueError: an empty path, a mount point, a name that is too long, or a folder that overlaps an input.
        FileExistsError: the path is a file.
    """
    if not str(folder).strip() or not is_path(folder) or not is_utf8(folder):
        raise SmileError(f"out: is {str(folder)!r}; expected the path of a folder to write, in UTF-8")
    path = Path(os.path.realpath(folder))
    limits = [("name", path.name, 255 - len("..old-0123456789ab-1")), ("path", str(path), 4096 - 512)]
    for kind, part, longest in [*limits, *(("name", parent, 255) for parent in path.parts)]:
        if len(os.fsencode(part)) > longest:
            raise SmileError(f"out: has a {kind} of {len(os.fsencode(part))} bytes, {part}; expected at most {longest}")
    if path.is_symlink():
        raise SmileError(f"out: {path} is a link to itself; expected the path of a folder to write")
    if os.path.ismount(path):
        raise SmileError(f"out: {path} is a mount point; expected a folder inside it")
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise FileExistsError(f"{above}: is not a folder; expected one, to write {path.name} in")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: is a file; expected a new or empty folder")
    for name, source in (inputs or {}).items():
        source = Path(os.path.realpath(source))
        for folder in (source, *source.parents):
            if folder.parent == path.parent and _is_of(folder.name, path.name):
                raise SmileError(f"out: {folder} is of {path}, and {name} is there; expected an input apart from it")
        if path == source or path in source.parents or source in path.parents:
            how = "is" if path == source else "contains" if path in source.parents else "is inside"
            raise SmileError(f"out: {path} {how} {name}, {source}; expected a folder apart from every input")
    return path


def _is_of(name: str, output: str) -> bool:
    """Whether a folder of this name is of the intermediate files of an output."""
    return name == f"{output}.partial" or name.startswith(f".{output}.old-")


def is_utf8(path: str | Path) -> bool:
    """Whether safetensors can open files of this path."""
    try:
        os.fsencode(path).decode()
    except UnicodeError:
        return False
    return True


def is_path(path: str | Path) -> bool:
    """Whether a file can have this path: no null character, and no surrogate that is not a byte."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


@contextmanager
def output_folder(
    folder: Path, settings: Mapping[str, Any], *, force: bool, writes: Sequence[str] = _ANY_FILE
) -> Iterator[OutputFolder]:
    """Lock `folder` (from `check_folder`) and prepare its work folder, new or left by a run with equal settings.

    Args:
        folder: path of the output.
        settings: everything that the result depends on, as JSON; {} for a result that is recomputed at each call.
        force: replace a folder written by smile-kernels, and unfinished work with other settings.
        writes: patterns of the files that the job writes in the work folder, which may be deleted later.

    Raises:
        FileExistsError: the folder contains files that may not be replaced, another process is writing it, or there is
            unfinished work with other settings. Nothing is changed then.
    """
    settings = json.loads(json.dumps(settings))
    for parent in reversed(folder.parents):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
    with _locked(folder):
        yield _prepare(folder, settings, writes, force)


def _prepare(folder: Path, settings: Mapping[str, Any], writes: Sequence[str], force: bool) -> OutputFolder:
    begun = _begun_settings(work_folder(folder), force)
    before = (begun or {}).pop(_WRITES, None)
    if not isinstance(before, list) or not all(isinstance(pattern, str) for pattern in before):
        before = _ANY_FILE
    output = OutputFolder(folder, settings, before)
    _check_work(output.work, before)
    olds = _restored(folder)
    complete = (
        bool(settings)
        and _wrote(folder)
        and not missing_files(folder)
        and _read_manifest(folder).get("settings") == _digest(settings)
    )
    if not complete:
        _check_replaceable(folder, force)
    if begun and not settings and _read_manifest(folder).get("settings") != _digest(begun):
        raise FileExistsError(
            f"{output.work}: is an unfinished run of upscale; expected it finished by the same command, or deleted"
        )
    if begun and begun != settings and not complete and not force:
        changed = sorted(key for key in begun.keys() | settings.keys() if begun.get(key) != settings.get(key))
        raise FileExistsError(
            f"{output.work}: was started with another {', '.join(changed)}; expected the same, "
            "or force=True (--force) to restart"
        )
    for old in olds:
        _remove_old(old)
    if begun is not None and (complete or begun != settings or not settings):
        output.discard()
    if complete:
        return OutputFolder(folder, settings, complete=True)
    output.work.mkdir(exist_ok=True)
    _give_access(output.work, folder)
    for path in reversed(paths(output.work)):  # contents before folders
        # Temporary files of a killed process, and copies of files that an input does not have any more.
        if path.is_file() and (_TEMPORARY.search(path.name) or not _is_written(path, output.work, writes)):
            path.unlink()
        elif path.parent != output.work and _empty(path):
            path.rmdir()
    try:
        write_text(output.work / SETTINGS, json.dumps({**settings, _WRITES: writes}, indent=1) + "\n")
    except OSError:
        if _empty(output.work):
            output.work.rmdir()
        raise
    output.output.mkdir(exist_ok=True)
    _give_access(output.output, folder)
    return OutputFolder(folder, settings, writes, replaces=_wrote(folder))


def _give_access(made: Path, replaced: Path) -> None:
    """Let those, and only those, read a new folder who may read the one that it replaces, if there is one."""
    if not replaced.is_dir():
        return
    access = replaced.stat()
    with contextlib.suppress(OSError):  # a group of others, or a file system without modes
        if access.st_gid != made.stat().st_gid:
            os.chown(made, -1, access.st_gid)
        os.chmod(made, stat.S_IMODE(access.st_mode) | stat.S_IRWXU)


def _check_work(work: Path, writes: Sequence[str]) -> None:
    """Raise FileExistsError if a work folder contains a link, or a file that matches none of the patterns `writes`."""
    for path in paths(work) if work.exists() else ():
        if path.is_symlink() or not (path.is_dir() or _is_written(path, work, writes)):
            raise FileExistsError(
                f"{path}: was not created by smile-kernels; expected no such file where its intermediate files are"
            )


def _is_written(file: Path, work: Path, writes: Sequence[str]) -> bool:
    """Whether a file of a work folder is its settings or matches one of the patterns `writes`, or is a part of one."""
    name = _TEMPORARY.sub(r"\1\2", str(file.relative_to(work)))
    return name == SETTINGS or any(fnmatch.fnmatchcase(name, pattern) for pattern in writes)


def _begun_settings(work: Path, force: bool) -> dict[str, Any] | None:
    """The settings of a work folder; {} if they cannot be read, None if there is no work folder."""
    if not os.path.lexists(work):
        return None
    if work.is_symlink() or not work.is_dir():
        raise FileExistsError(f"{work}: is not a folder; expected none, since intermediate files are kept there")
    names = sorted(file.name for file in work.iterdir())
    known = ("layers", "output", SETTINGS) if SETTINGS in names else ()
    if foreign := [name for name in names if name not in known and not name.startswith(f".{SETTINGS}.")]:
        raise FileExistsError(
            f"{work}: contains {foreign[0]}, which was not created by smile-kernels; expected no folder"
        )
    if SETTINGS not in names:
        return {}
    begun = _read_object(work / SETTINGS)
    if begun is not None:
        return begun
    if not force:
        raise FileExistsError(f"{work / SETTINGS}: is damaged; expected force=True (--force), to start again")
    return {}


def _check_replaceable(folder: Path, force: bool) -> None:
    """Raise FileExistsError if `folder` is not empty; with `force`, if it contains files not in its manifest."""
    if not folder.exists() or _empty(folder):
        return
    if not force:
        raise FileExistsError(
            f"{folder}: is not empty; expected a new or empty folder, or force=True (--force) to replace it"
        )
    if foreign := _foreign_files(folder):
        raise FileExistsError(
            f"{folder}: contains {foreign[0]}, which smile-kernels did not write; only what it wrote is replaced"
        )


def _write_manifest(folder: Path, settings: Mapping[str, Any]) -> None:
    files = {str(f.relative_to(folder)): fingerprint(f) for f in paths(folder) if f.is_file()}
    files.pop(MANIFEST, None)
    write_text(folder / MANIFEST, json.dumps({"settings": _digest(settings), "files": files}, indent=1) + "\n")


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; {} if there is no readable one."""
    manifest = _read_object(folder / MANIFEST) or {}
    return manifest if isinstance(manifest.get("files"), dict) and "settings" in manifest else {}


def _read_object(file: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where it is not a regular file, or holds no object."""
    try:
        value = json.loads(file.read_text()) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def paths(folder: Path) -> list[Path]:
    """Everything in a folder, sorted. A folder in it that cannot be read raises OSError; `rglob` would leave it out."""

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=refuse)
    return sorted(Path(parent, name) for parent, folders, files in walk for name in (*folders, *files))


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


def _wrote(folder: Path) -> bool:
    """Whether smile-kernels wrote everything in a folder."""
    return bool(_read_manifest(folder)) and not _foreign_files(folder)


def _foreign_files(folder: Path) -> list[str]:
    """The files of a folder that are not in its manifest or have changed; a link to a folder is itself one."""
    if folder.is_symlink():
        return [folder.name]
    manifest = _read_manifest(folder)
    known = manifest.get("files", {})
    parents = {str(parent) for name in known for parent in Path(name).parents}
    foreign = []
    for path in paths(folder):
        name = str(path.relative_to(folder))
        if path.is_dir() and not path.is_symlink():
            ours = name in parents
        else:
            ours = (name == MANIFEST and bool(manifest)) or (name in known and known[name] == fingerprint(path))
        if not ours:
            foreign.append(name)
    return foreign


def missing_files(folder: Path) -> list[str]:
    """The files of a folder's manifest that are missing."""
    return [name for name in _read_manifest(folder).get("files", {}) if not (folder / name).exists()]


def fingerprint(file: Path) -> str | None:
    """A hash of a file's content; None for anything else. A file that has not changed since is read once."""
    if file.is_symlink() or not file.is_file():
        return None
    status = file.stat()
    changed = max(status.st_mtime_ns, status.st_ctime_ns)
    read = _hash if time.time_ns() - changed > _SETTLED else _hash.__wrapped__
    return read(file, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=1 << 14)
def _hash(file: Path, *status: int) -> str:
    digest = hashlib.sha256()
    with naming(file), open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _remove_old(folder: Path) -> None:
    """Delete a replaced folder, its manifest last; keep it, with a warning, if that may not be done."""
    if foreign := _foreign_files(folder):
        why = f"it contains {foreign[0]}, which smile-kernels did not write"
    else:
        try:
            return _remove(folder, last=MANIFEST)
        except PermissionError as error:
            why = f"{Path(error.filename or folder).name} may not be deleted"
    kept = folder.with_name(folder.name.lstrip("."))
    os.rename(folder, kept)
    warnings.warn(f"{kept}: the replaced folder is kept: {why}", stacklevel=2)


def _remove(folder: Path, last: str) -> None:
    """Delete a folder, of its files the one with the name `last` as the last one."""
    for path in reversed(paths(folder)):  # contents before folders
        if path.is_dir():
            path.rmdir()
        elif path != folder / last:
            path.unlink()
    (folder / last).unlink(missing_ok=True)
    folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock on writing `folder`; the kernel releases it when the process ends."""
    file = folder.with_name(f".{folder.name}.lock")
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise FileExistsError(f"{file}: cannot be the lock of {folder} ({error.strerror})") from None
        status = os.fstat(descriptor)
        if status.st_size or not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise FileExistsError(f"{file}: was not created by smile-kernels; expected no file, for a lock")
        try:
            if _lock(descriptor, file):
                break
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise FileExistsError(f"{folder}: another process is writing it ({file} is locked)") from None
            raise OSError(error.errno, f"cannot be the lock of {folder} ({error.strerror})", str(file)) from None
        os.close(descriptor)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        with naming(file):
            os.close(descriptor)


def _lock(descriptor: int, file: Path) -> bool:
    """Lock an open file; False where its last owner has renamed or deleted it in the meantime."""
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with contextlib.suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == os.stat(file).st_ino
    return False


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk; without permission to read the folder, the system does so later."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    with naming(folder):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
