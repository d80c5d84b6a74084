"""The bundle: one directory per built model, described by a manifest.

    manifest.json            written last and in one step; without it nothing loads
    config.json              the checkpoint's, as generation_config.json
    tokenizer.json …         the tokenizer and the chat template as transformers reads them
    onnx/                    one graph per part, its weights beside it
    engines/<back end>/      engines that were compiled from the graphs
    stamps/                  what each part was made from, for the next build, and the command of this one
    next/                    what a build has written so far (`export.swap`)

The manifest holds its own SHA-256 and that of every other file; all of them are
checked before a model is loaded.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from engines.config import Capacity, ModelConfig, strict
from engines.errors import BundleError, NewerBundleError
from engines.files import canonical, check_access, sha256, signed, write_atomically
from engines.locks import LOCK
from engines.record import NEXT, enlarge, rebuild

FORMAT = "elastic-bundle"
VERSION = 7
MANIFEST = "manifest.json"
STAMPS = "stamps"


@dataclass(frozen=True)
class Manifest:
    """The content of a bundle.

    `model` and `capacity` are the fields of ModelConfig and Capacity, `defaults`
    decoding options by name, `parts` the exported graph, weight file, inputs and
    outputs of each part, `engines` an entry for each back end, `files` the size and
    SHA-256 of each file. `replaces` is None but for the moment in which the files of
    a finished build lie in `next/` still: then it names the files of the bundle before.
    """

    model: dict[str, Any]
    capacity: dict[str, int]
    precision: str
    defaults: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    engines: dict[str, dict[str, Any]]
    checkpoint: dict[str, str]
    tools: dict[str, str]
    files: dict[str, dict[str, Any]]
    replaces: list[str] | None = None
    format: str = FORMAT
    version: int = VERSION

    @property
    def folder(self) -> str:
        """Where below the bundle its files lie."""
        return "." if self.replaces is None else NEXT


@dataclass
class Bundle:
    """An opened bundle. A file's path is handed out after its content was checked once."""

    root: Path
    manifest: Manifest
    config: ModelConfig
    capacity: Capacity
    _checked: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, root: str | Path) -> "Bundle":
        """Read and check the manifest in the folder `root`; raises BundleError for anything but a complete bundle."""
        root = Path(root)
        manifest = read_manifest(root)
        try:
            config = ModelConfig.from_json(manifest.model, f"{root}: model")
            capacity = strict(Capacity, manifest.capacity, f"{root}: capacity")
        except BundleError as error:
            raise BundleError(f"{error}; {rebuild(root)}") from error
        return cls(root=root, manifest=manifest, config=config, capacity=capacity)

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that change with any file, version or option of the bundle."""
        return hashlib.sha256(canonical(vars(replace(self.manifest, replaces=None)))).hexdigest()[:16]

    def file(self, name: str) -> Path:
        """The path of a file of the bundle, its size and SHA-256 checked once; raises BundleError if they differ."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.root}: the manifest lists no file {name!r}; {self.rebuild('--force')}")
        path = inside(self.root, name, self.manifest.folder)
        if name not in self._checked:
            expected = self.manifest.files[name]
            check_access(path, BundleError)
            try:
                intact = path.stat().st_size == expected["size"] and sha256(path) == expected["sha256"]
            except (FileNotFoundError, NotADirectoryError) as error:
                raise BundleError(f"{self.root}: {name} is missing; {self.rebuild()}") from error
            except OSError as error:
                raise BundleError(f"{self.root}: {name} cannot be read ({error.strerror}); {self.rebuild()}") from error
            if not intact:
                raise BundleError(
                    f"{self.root}: {name} is not the file that was built (SHA-256 differs); {self.rebuild()}"
                )
            self._checked.add(name)
        return path

    def check(self, names: Iterable[str] | None = None) -> None:
        """Check the files `names` (None: all), in parallel; raises BundleError for the first that differs.

        A path in the manifest that leaves the bundle is refused, whoever needs it.
        """
        for name in self.manifest.files:
            inside(self.root, name)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(self.file, sorted(self.manifest.files if names is None else names)))

    def files_for(self, backend: str | None) -> set[str]:
        """The files that a back end reads: texts, and its engines with their weights (None: the exported parts).

        Raises BundleError if the bundle does not have them.
        """
        parts = self.exported if backend is None else self.engines(backend)["parts"]
        engines = {(p.get("graph"), p["weights"], *p.get("plans", {}).values()) for p in parts.values()}
        return {name for name in self.manifest.files if "/" not in name} | set().union(*engines) - {None}

    @property
    def exported(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries of the exported parts; raises BundleError for a pack without them."""
        if not self.manifest.parts:
            raise BundleError(f"{self.root} is a pack without the exported parts; use the bundle that it was made from")
        return self.manifest.parts

    def graph(self, part: str, backend: str | None = None) -> Path:
        """The graph of `part` for `backend` (None: as exported), its weights checked, too; raises BundleError."""
        entry = (self.exported if backend is None else self.engines(backend)["parts"]).get(part)
        if entry is None:
            raise BundleError(
                f"{self.root}: the manifest has no engine of {part} for {backend}; {self.rebuild('--force')}"
            )
        if entry["weights"]:
            self.file(entry["weights"])
        return self.file(entry["graph"])

    def engines(self, backend: str) -> dict[str, Any]:
        """The manifest's entry for a back end; raises BundleError if the bundle has no engines for it."""
        built = self.manifest.engines
        if backend not in built:
            problem = f"{self.root} has no engines for {backend}{', only for ' if built else ''}{', '.join(built)}"
            if backend == "tensorrt" and self.manifest.precision == "fp32":
                raise BundleError(f"{problem}; TensorRT needs another bundle, of --fp16 or --bf16")
            raise BundleError(f"{problem}; to add them, {self.rebuild('--backend', backend)}")
        return built[backend]

    def weights(self, part: str) -> Path:
        """The weight file of `part` in the bundle's precision."""
        return self.file(self.exported[part]["weights"])

    def rebuild(self, *more: str) -> str:
        """The remedy where the bundle cannot be used, as `engines.record.rebuild`."""
        return rebuild(self.root, *more, folder=self.manifest.folder)

    def enlarge(self, flag: str, size: int) -> str:
        """The end of a remedy where the bundle is too small, as `engines.record.enlarge`."""
        return enlarge(self.root, flag, size, self.manifest.folder)

    @property
    def verify(self) -> str:
        """The command that compares the bundle's parts with the reference."""
        return shlex.join(["python", "-m", "export", "verify", str(self.root)])


def inside(root: Path, name: str, folder: str = ".") -> Path:
    """The path of `name` in the bundle at `root`, whose files lie in `folder`.

    Raises BundleError for a name that leaves the bundle. Links are followed: what is read has a SHA-256.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise BundleError(f"{root}: the manifest names {name!r}, which leaves the bundle; {rebuild(root, '--force')}")
    return root / folder / relative


def read_manifest(root: Path) -> Manifest:
    """The manifest of the bundle at `root`; raises BundleError for anything but a complete bundle of this version."""
    path = root / MANIFEST
    check_access(root, BundleError)
    if os.path.isfile(root):
        raise BundleError(f"{root} is a file and not a bundle; give a bundle's folder")
    if not os.path.isdir(root):
        raise BundleError(f"there is no bundle at {root}; `python -m export build --help` shows how to build one")
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        found = content["format"], content["version"]
    except FileNotFoundError as error:
        if (root / "config.json").is_file() and any(root.glob("*.safetensors")):
            raise BundleError(
                f"{root} is a checkpoint and not a bundle; build one with "
                f"`{shlex.join(['python', '-m', 'export', 'build', '--checkpoint', str(root)])}`"
            ) from error
        if not any((root / name).exists() for name in (STAMPS, NEXT, LOCK)):
            raise BundleError(f"{root} holds no {MANIFEST} and is no bundle; give a bundle's folder") from error
        raise BundleError(f"{root} holds no {MANIFEST}: its build was not finished; {rebuild(root)}") from error
    except PermissionError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged ({error}); {rebuild(root)}") from error
    if found[0] != FORMAT or not isinstance(found[1], int):
        raise BundleError(f"{path} is not a manifest of this project (format {found[0]!r}); {rebuild(root)}")
    if found[1] != VERSION:
        newer = found[1] > VERSION
        raise (NewerBundleError if newer else BundleError)(
            f"{root} has manifest version {found[1]} and this installation reads {VERSION}; "
            f"{'update this installation' if newer else rebuild(root)}"
        )
    content.pop("sha256", None)
    if raw != signed(content):
        raise BundleError(f"{path} is damaged (its SHA-256 differs); {rebuild(root)}")
    try:
        manifest: Manifest = strict(Manifest, content, str(path))
    except BundleError as error:
        raise BundleError(f"{error}; {rebuild(root)}") from error
    return manifest


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write the manifest in one step, with its SHA-256; raises OSError."""
    write_atomically(root / MANIFEST, signed(vars(manifest)))
