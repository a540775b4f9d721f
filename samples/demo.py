"""The main job, from the shipped checkpoint to a picture: what `make demo` runs. Says how long each stage took."""

import subprocess
import sys
import time
from pathlib import Path

CHECKPOINT = Path("samples/shapes/shapes.safetensors")
BUNDLE, PICTURE = Path("bundles/shapes"), Path("out/red-cube-on-blue-sphere.png")
PROMPT = "a red cube on a blue sphere"


def main() -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    export = ["tpx-export", "--ckpt", str(CHECKPOINT), "--depth", "3", "--out", str(BUNDLE), "--force"]
    draw = ["tpx-run", PROMPT, "--bundle", str(BUNDLE), "--out", str(PICTURE), "--force"]
    seconds = {}
    for stage, command in (("export and verify", export), ("draw, without torch", draw)):
        print("$", subprocess.list2cmdline(command), flush=True)
        began = time.monotonic()
        program = Path(sys.executable).with_name(command[0])
        if code := subprocess.run([program, *command[1:]], check=False).returncode:
            sys.exit(code)
        seconds[stage] = time.monotonic() - began
    for stage, taken in seconds.items():
        print(f"{stage:<22}{taken:>6.1f} s")
    print(f"The picture: {PICTURE}")


if __name__ == "__main__":
    main()
