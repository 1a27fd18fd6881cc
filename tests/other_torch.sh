#!/usr/bin/env bash
# The tests that depend most on torch and Triton, under another version of them:
#
#     tests/other_torch.sh 2.11.0 [folder]
#
# The folder holds the environment, several GB with a CUDA build, which runs on a CPU too. It is kept, and the
# next call uses it again; without one, it is named after the version and lies in the folder for temporary files.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:?"the version must be given: tests/other_torch.sh 2.11.0"}
env=${2:-${TMPDIR:-/tmp}/nanoblocks-torch-$version}
[ -x "$env/bin/python" ] || python3 -m venv "$env"
python=$env/bin/python
wanted=("torch==$version")
# the interpreter of Triton 3.6, which torch 2.11 brings, fails with later ones
[[ $version == 2.11* ]] && wanted+=('numpy<2.4')
"$python" -m pip install -q "${wanted[@]}" -r <(grep -hv -e '^torch' -e '^triton' -e '^-r' requirements*.txt)
export OMP_NUM_THREADS=1
"$python" -c "import numpy, torch, triton
print('torch', torch.__version__, 'triton', triton.__version__, 'numpy', numpy.__version__)"
# kernels, with the three dry runs of bench.py gpu; graphs and gradients of all models; decoding; state space
exec "$python" -m pytest -q -rf tests/test_compiled.py tests/test_kernels.py tests/test_state_space.py \
    tests/test_decode.py
