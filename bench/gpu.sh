#!/usr/bin/env bash
# Everything that needs a GPU, in less than 10 minutes and without network or installation:
#   bench/gpu.sh OUT_DIR [options of run.py]
# Tests, compute-sanitizer and benchmark; each writes a log into OUT_DIR. A stage that fails does not
# stop the next ones, but the exit status says so. STAGES chooses some of them, BENCH_SECONDS the
# budget of the benchmark.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:?usage: bench/gpu.sh OUT_DIR}"
out=$(cd "$1" && pwd)
shift
stages=" ${STAGES:-machine check pytest memcheck racecheck bench} "
budget=${BENCH_SECONDS:-110}
python=${PYTHON:-python3}

# The folder kernels/ is the package fusedreg.kernels: put it there, as an installation would. What
# runs below starts in that directory, because `python -m` puts the current one first.
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/fusedreg"
ln -s "$root"/fusedreg/* "$root/kernels" "$package/fusedreg/"
cd "$package"
export PYTHONPATH=$package PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

failed=()
stage() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 status=0
    shift 2
    if [[ $stages != *" $name "* ]]; then return; fi
    echo "---- $name"
    timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
    tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
    if ((status != 0)); then
        failed+=("$name: exit status $status")
    fi
}

# Some steps of `fusedreg check`, over tensors of odd sizes that are small enough for the tools.
sanitize() { # TOOL SECONDS OPTIONS...
    local tool=$1 seconds=$2
    shift 2
    if [[ $stages != *" $tool "* ]]; then return; fi
    if command -v compute-sanitizer >/dev/null; then
        stage "$tool" "$seconds" compute-sanitizer --tool "$tool" --error-exitcode 1 "$@" \
            "$python" -m fusedreg check --device cuda --dtype float32 --dtype bfloat16 \
            --case sgd_momentum-decay --case adamw-elastic_net --case lamb-elastic_net
    else
        echo "---- $tool: no compute-sanitizer on PATH" | tee "$out/$tool.log"
    fi
}

stage machine 30 "$python" -c "
import fusedreg.kernels.gpu.backend, platform, sys, torch, triton
print(platform.platform(), 'python', platform.python_version())
print('torch', torch.__version__, 'triton', triton.__version__, 'cuda', torch.version.cuda)
print('fusedreg', fusedreg.__version__, fusedreg.__file__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA GPU')
sys.exit(not torch.cuda.is_available())
"

stage check 90 "$python" -m fusedreg check --json "$out/check.json"

# The compilation of some 200 kernels takes most of the time, so several processes share it.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
stage pytest 200 "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" \
    -p no:cacheprovider -m gpu "${workers[@]}" --durations=10 \
    "$root/tests/kernels/test_gpu.py" "$root/tests/kernels/test_own_rule.py" \
    "$root/tests/docs/test_recipes.py"

# Without torch's cache each tensor is an allocation of its own, whose bounds memcheck knows. Errors
# of API calls are those by which torch finds out what the machine can do.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck 60 --report-api-errors no
sanitize racecheck 60

LINES_SHOWN=400 stage bench $((budget + 30)) \
    "$python" "$root/bench/run.py" "$out" --budget "$budget" "$@"

if ((${#failed[@]})); then
    printf 'FAILED %s\n' "${failed[@]}"
    exit 1
fi
echo "all stages passed"
