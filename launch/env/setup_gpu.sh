#!/usr/bin/env bash
# Makes an environment for CUDA from launch/env/gpu.lock: verl 0.9.1's own pins and what they need, nothing resolved here.
#
#   launch/env/setup_gpu.sh                                 .venv-gpu, without flash-attn (see below)
#   launch/env/setup_gpu.sh --flash-attn WHEEL_OR_URL       with a prebuilt flash-attn 2.8.3
#   launch/env/setup_gpu.sh --flash-attn build              compiled here: an hour, and a CUDA 13 toolkit
#   launch/env/setup_gpu.sh --venv FOLDER --python PYTHON   elsewhere, with another Python 3.11 or 3.12
#   launch/env/setup_gpu.sh --container                     into this Python, as launch/env/klreg.def does: no GPU needed
#   launch/env/setup_gpu.sh --dry-run                       prints the commands
#
# Without flash-attn a recipe says so (klreg run names both lines if they are missing) and sets train.micro_batch:
#   verl: {actor_rollout_ref.model.override_config.attn_implementation: sdpa, actor_rollout_ref.model.use_remove_padding: false}
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
lock="$root/launch/env/gpu.lock" flash_version=2.8.3
venv="$root/.venv-gpu" python="" flash="" container=no dry=no

refuse() { echo "[setup] cannot go on: $*" >&2; exit 1; }
say() { echo "[setup] $*"; }
run() { if [ "$dry" = yes ]; then echo "$*"; else "$@"; fi; }
needs() { [ $# -ge 2 ] || refuse "$1 needs a value (see the head of this file)."; }

while [ $# -gt 0 ]; do
    case "$1" in
        --venv) needs "$@"; venv=$2; shift 2 ;;
        --python) needs "$@"; python=$2; shift 2 ;;
        --flash-attn) needs "$@"; flash=$2; shift 2 ;;
        --container) container=yes; shift ;;
        --dry-run) dry=yes; shift ;;
        *) refuse "unknown option $1 (see the head of this file)." ;;
    esac
done

find_python() {
    for name in ${python:-python3.11 python3.12 python3}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    refuse "verl 0.9.1 and vLLM need Python 3.11 or 3.12. Install one, or name it: --python /path/to/python3.11."
}

check_machine() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || refuse "the pins have wheels for Linux on x86-64, this is $(uname -s) $(uname -m)."
    [ "$container" = no ] || return 0
    command -v nvidia-smi >/dev/null || refuse "nvidia-smi is not there, so this machine has no NVIDIA driver. \`make setup\` makes the CPU's environment; on a login node without GPUs use --container inside an image."
    local driver
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
    case "$driver" in [0-9]*.*) ;; *) refuse "nvidia-smi does not answer. Reboot after a driver update, or have the machine looked at." ;; esac
    [ "$(printf '580.65\n%s\n' "$driver" | sort -V | head -n 1)" = 580.65 ] || refuse "the NVIDIA driver is $driver, CUDA 13 needs 580.65 or newer. Update it; no Python package brings one."
    check_disk
}

check_disk() {
    local place free
    place=$(dirname "$venv")
    while [ ! -e "$place" ]; do place=$(dirname "$place"); done
    free=$(df -Pk "$place" | awk 'NR == 2 { print int($4 / 1048576) }') || refuse "df does not say how much disk $place has."
    [ "$free" -ge 25 ] || refuse "$place has $free GiB of free disk, the environment needs 25. Name another place with --venv."
}

# As launch/host.py, which klreg run asks: Triton compiles a launcher for each kernel when it first runs.
check_compiler() {
    command -v ${CC:-gcc} >/dev/null || command -v ${CC:-clang} >/dev/null || refuse "there is no C compiler (${CC:-gcc or clang}), with which Triton makes the kernels of vLLM and torch ready. Install one: apt-get install gcc."
    local include
    include=$("$found" -c 'import sysconfig as s; d = s.get_default_scheme(); print(s.get_paths(scheme="posix_prefix" if d == "posix_local" else d)["include"])')
    local place
    for place in $(echo "${CPATH:-}:${C_INCLUDE_PATH:-}" | tr : ' '); do [ ! -f "$place/Python.h" ] || include=$place; done
    [ -f "$include/Python.h" ] || refuse "$include/Python.h is not there, which each of Triton's launchers includes. Install the headers of $found (apt-get install python3.12-dev, or 3.11's), or name another Python."
}

found=$(find_python)
say "Python: $found"
[ "$dry" = yes ] || { check_machine; check_compiler; }
if [ "$container" = yes ]; then
    inside=$found scripts=$("$found" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
else
    [ ! -e "$venv" ] || [ -f "$venv/pyvenv.cfg" ] || refuse "$venv exists and is no environment. Name another with --venv."
    run "$found" -m venv "$venv"
    inside="$venv/bin/python" scripts="$venv/bin"
fi
pip=("$inside" -m pip install --no-deps --no-input --disable-pip-version-check)

# The builders first: what has no wheel is then built with them, and with nothing that pip chose.
lines=$("$found" "$root/launch/env/hashes.py" "$lock" --print) || refuse "launch/env/gpu.hashes does not fit gpu.lock."
listed=$(mktemp -d)
trap 'rm -rf "$listed"' EXIT
head -n 1 <<<"$lines" >"$listed/builders.txt"
tail -n +2 <<<"$lines" >"$listed/packages.txt"
for part in builders packages; do
    run "${pip[@]}" --require-hashes --no-build-isolation --requirement "$listed/$part.txt"
done
case "$flash" in
    "") say "without flash-attn: recipes need attn_implementation sdpa and use_remove_padding false" ;;
    build) run env MAX_JOBS="${MAX_JOBS:-8}" "${pip[@]}" --no-build-isolation "flash-attn==$flash_version" ;;
    *) run "${pip[@]}" "$flash" ;;
esac
run "${pip[@]}" --no-build-isolation --editable "$root"
run "$inside" -c 'import torch, transformers, verl, vllm; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
[ "$container" = yes ] || run "$inside" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU: is the driver new enough?"; print(torch.cuda.device_count(), "x", torch.cuda.get_device_name())'
say "ready: $scripts/klreg"
