"""CMake's launcher for nvcc: keeps what ptxas says of each kernel (registers, stack, spills) beside the object file.

tests/house/test_nvcc.py reads it, so that nothing is compiled twice.
"""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
result = subprocess.run([*command, "-Xptxas", "-v"], stderr=subprocess.PIPE, text=True)
if "-o" in command and result.returncode == 0:
    Path(command[command.index("-o") + 1] + ".ptxas").write_text(result.stderr)
told = [line for line in result.stderr.splitlines() if not line.startswith(("ptxas info", "    "))]
if told:
    print("\n".join(told), file=sys.stderr)
sys.exit(result.returncode)
