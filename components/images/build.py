"""Build the images, start each, and say how large they are: `make images`, or

    python components/images/build.py [--base IMAGE] [--registry REGISTRY] [IMAGE ...]

Needs buildah and root; without --base also debootstrap, which makes Debian 12 from its packages, so that no registry is
needed. With --registry the images are pushed, and images.json names them by digest, as
`opensora pipeline submit --images build/images/images.json` wants it.

Left in build/images/: an SBOM for each image (CycloneDX), sizes.json, images.json.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "images"
IMAGES = ("data", "caption", "train", "evaluate")
PREFIX = "opensora-python-"
BASE = "localhost/opensora-debian"
SUITE = "bookworm"
START_S = 2.0  # that `opensora --help` may take in a started container
MIB = 2**20
# What lies where in an image.
PARTS = {"system": "usr", "torch": "opt/torch", "packages": "opt/opensora", "code": "app"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(IMAGES)}; default: all")
    parser.add_argument("--base", help="a Debian 12 image, as docker.io/library/debian:bookworm-slim")
    parser.add_argument("--registry", help="where images are pushed to, as registry.example.com/team")
    parser.add_argument("--plain-http", action="store_true", help="the registry has no TLS")
    arguments = parser.parse_args()
    names = arguments.images or list(IMAGES)
    unknown = [name for name in names if name not in IMAGES]
    if unknown:
        sys.exit(f"error: unknown image {unknown[0]}; one of {', '.join(IMAGES)}")
    needed = ["buildah"] + ([] if arguments.base or has_image(BASE) else ["debootstrap"])
    missing = [tool for tool in needed if not shutil.which(tool)]
    if missing:
        sys.exit(f"error: {' and '.join(missing)} not found; on Debian: apt-get install {' '.join(missing)}")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    base = arguments.base or debian()
    revision = commit()
    rows, pushed = {}, {}
    for name in names:
        started = time.monotonic()
        image = build(name, base, revision)
        seconds = time.monotonic() - started
        rows[name] = start(name, image) | {"build_s": round(seconds, 1)}
        if arguments.registry:
            pushed[PREFIX + name] = push(name, image, arguments.registry, arguments.plain_http)
    report(rows, revision)
    if pushed:
        path = OUTPUT / "images.json"
        write(path, pushed)
        print(f"\nby digest in {path.relative_to(ROOT)}, for `opensora pipeline submit --images`")
    slow = [name for name, row in rows.items() if row["help_s"] > START_S]
    if slow:
        print(f"slow to start (over {START_S} s): {', '.join(slow)}", file=sys.stderr)


def has_image(name: str) -> bool:
    if not shutil.which("buildah"):
        return False
    return run("buildah", "inspect", "--type", "image", name, check=False, quiet=True).returncode == 0


def debian() -> str:
    """A base image of nothing but Debian's essential packages, made once."""
    if has_image(BASE):
        return BASE
    print(f"making {BASE} by debootstrap")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        run("debootstrap", "--variant=minbase", SUITE, str(root), quiet=True)
        for path in (root / "var/cache/apt/archives").glob("*.deb"):
            path.unlink()
        run("tar", "--create", "--file", f"{folder}/root.tar", "--directory", str(root), ".")
        (Path(folder) / "Containerfile").write_text("FROM scratch\nADD root.tar /\n")
        run("buildah", "bud", "--isolation", "chroot", "--tag", BASE, "--ignorefile", "/dev/null", folder, quiet=True)
    return BASE


def commit() -> str:
    """The revision that labels name; `-dirty` when files differ from it."""
    found = run("git", "-C", str(ROOT), "rev-parse", "HEAD", quiet=True).stdout.strip()
    return found + ("-dirty" if run("git", "-C", str(ROOT), "status", "--porcelain", quiet=True).stdout.strip() else "")


def pip_settings(folder: Path) -> list[str]:
    """Mounts by which the stages that build use the index, wheels and certificates that pip here is told to use.

    Nothing of them stays in an image.
    """
    mounts: list[str] = []
    settings: dict[str, str] = {}
    listed = run(sys.executable, "-m", "pip", "config", "list", quiet=True).stdout.splitlines()
    weight = ("global", "user", "site", ":env:")  # what comes later wins
    for line in sorted(listed, key=lambda line: weight.index(line.split(".")[0])):
        name, _, value = line.partition("=")
        words = []
        for word in shlex.split(value.strip("'").replace("\\n", " ")):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                top = path.parent if path.name == "simple" else path  # an index's files lie beside it
                mounts += ["--volume", f"{top}:/run/pip{top}:ro"]
                word = word.replace(str(path), f"/run/pip{path}")
            words.append(word)
        settings[name.split(".")[-1]] = " ".join(words)
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines))
    return [*mounts, "--volume", f"{folder}/pip.conf:/etc/pip.conf:ro"]


def build(name: str, base: str, revision: str) -> str:
    """Build one image; returns its name in the local store."""
    print(f"building {PREFIX}{name}")
    image = f"localhost/{PREFIX}{name}:{revision[:12]}"
    options = ["--format", "docker", "--isolation", "chroot", "--network", "host", "--layers"]
    options += ["--target", name, "--tag", image, "--build-arg", f"BASE={base}", "--build-arg", f"REVISION={revision}"]
    file = str(ROOT / "components" / "images" / "Containerfile")
    ignore = str(ROOT / ".containerignore")
    log = OUTPUT / f"{name}.log"
    with log.open("w") as handle, tempfile.TemporaryDirectory() as folder:
        mounts = pip_settings(Path(folder))
        command = ["buildah", "bud", *options, *mounts, "--ignorefile", ignore, "--file", file, str(ROOT)]
        done = subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        sys.exit(f"{tail}\nerror: {name} could not be built; {log.relative_to(ROOT)} has all of it")
    return image


def start(name: str, image: str) -> dict[str, float]:
    """Start the image as its user and ask `opensora doctor`; keep its SBOM; returns sizes and times."""
    container = run("buildah", "from", image, quiet=True).stdout.strip()
    try:

        def inside(*command: str) -> subprocess.CompletedProcess[str]:
            options = ["--isolation", "chroot", "--network", "host"]
            return run("buildah", "run", *options, container, "--", *command, quiet=True, check=False)

        times = []
        for _ in range(3):
            begun = time.monotonic()
            helped = inside("opensora", "--help")
            times.append(time.monotonic() - begun)
        checked = inside("opensora", "doctor", "--profile", "smoke", "--workdir", "/tmp/runs")
        print("  " + checked.stdout.rstrip().replace("\n", "\n  "))
        if helped.returncode or checked.returncode:
            sys.exit(f"error: {image} does not start well: {helped.stderr}{checked.stderr}")
        user = inside("id", "-u").stdout.strip()
        if user == "0":
            sys.exit(f"error: {image} runs as root")
        root = Path(run("buildah", "mount", container, quiet=True).stdout.strip())
        bom = (root / "opt/opensora/sbom.cdx.json").read_text()
        (OUTPUT / f"{name}.cdx.json").write_text(bom)
        sizes = {what: round(size(root / place)) for what, place in PARTS.items()}
    finally:
        run("buildah", "rm", container, quiet=True)
    return sizes | {"help_s": round(min(times), 2), "components": len(json.loads(bom)["components"])}


def size(folder: Path) -> float:
    """MiB of all files below it."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / MIB


def push(name: str, image: str, registry: str, plain_http: bool) -> str:
    """Push; returns the name by digest."""
    target = f"{registry.rstrip('/')}/{PREFIX}{name}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digest"
        tls = ["--tls-verify=false"] if plain_http else []
        run("buildah", "push", *tls, "--digestfile", str(file), image, f"docker://{target}", quiet=True)
        return f"{target}@{file.read_text().strip()}"


def report(rows: dict[str, dict[str, float]], revision: str) -> None:
    """Print the sizes, and keep them."""
    write(OUTPUT / "sizes.json", {"revision": revision, "images": rows})
    columns = ["system", "torch", "packages", "code", "components", "help_s", "build_s"]
    print("\n" + " ".join(f"{title:>12}" for title in ["MiB", *columns]))
    for name, row in rows.items():
        print(" ".join(f"{value:>12}" for value in [name, *(row[column] for column in columns)]))


def write(path: Path, value: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def run(*command: str, check: bool = True, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=quiet, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"{done.stderr or ''}error: {command[0]} {command[1]} failed")
    return done


if __name__ == "__main__":
    os.umask(0o022)
    main()
