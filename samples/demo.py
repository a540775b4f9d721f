"""What `make demo` runs: export the shipped checkpoint, generate one image, and print the time of each stage."""

import subprocess
import sys
import time
from pathlib import Path

CHECKPOINT = Path("samples/shapes/shapes.safetensors")
BUNDLE, IMAGE = Path("bundles/shapes"), Path("out/red-cube-on-blue-sphere.png")
PROMPT = "a red cube on a blue sphere"


def main() -> None:
    IMAGE.parent.mkdir(exist_ok=True)
    export = ["tpx-export", "--ckpt", str(CHECKPOINT), "--depth", "3", "--out", str(BUNDLE), "--force"]
    generate = ["tpx-run", PROMPT, "--bundle", str(BUNDLE), "--out", str(IMAGE), "--force"]
    seconds = {}
    for stage, command in (("export and verify", export), ("generate, without torch", generate)):
        print("$", subprocess.list2cmdline(command), flush=True)
        began = time.monotonic()
        program = Path(sys.executable).with_name(command[0])
        if code := subprocess.run([program, *command[1:]], check=False).returncode:
            sys.exit(code)
        seconds[stage] = time.monotonic() - began
    for stage, elapsed in seconds.items():
        print(f"{stage:<24}{elapsed:>6.1f} s")
    print(f"image: {IMAGE}")


if __name__ == "__main__":
    main()
