#!/usr/bin/env bash
# kernels.metal on an NVIDIA GPU: the same text as on a Mac, 32-wide warps as simdgroups.
#   scripts/metal-on-cuda.sh build DIR   needs nvcc; makes DIR/check and DIR/cases.tar.gz (for compute capability 8.0 and 9.0)
#   scripts/metal-on-cuda.sh run DIR     needs a GPU; with compute-sanitizer on PATH also memcheck and racecheck
set -euo pipefail
dir=$(realpath -m "$2")

build() {
    cd "$(dirname "$0")/.."
    mkdir -p "$dir/cases"
    # Attributes and address spaces mean nothing to nvcc.
    sed -E 's/\[\[[^]]*\]\]//g; s/\b(device|threadgroup|constant|thread)\b//g' src/backend/kernels.metal > "$dir/kernels.cu"
    local library
    library=$(dirname "$(find -L "$(dirname "$(command -v nvcc)")/.." -name libcudart_static.a -print -quit)")
    nvcc -std=c++17 -O1 -w -lineinfo -DKERNELS="\"$dir/kernels.cu\"" -I tests/metal_host/cuda -cudart static -L "$library" \
        -cudadevrt none -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
        tests/metal_host/cuda/check.cu -o "$dir/check"
    METAL_HOST_CASES="$dir/cases" cargo test --locked --test metal_host -- every_kernel_agrees_with_the_reference
    tar czf "$dir/cases.tar.gz" -C "$dir" cases
    rm -r "$dir/cases" "$dir/kernels.cu"
}

run() {
    local folder status=0
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' RETURN
    tar xzf "$dir/cases.tar.gz" -C "$folder"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
    echo "== as it is"
    "$dir/check" "$folder"/cases/* || status=1
    if ! command -v compute-sanitizer > /dev/null; then
        echo "SKIPPED: memcheck and racecheck, for there is no compute-sanitizer on PATH"
        return 1
    fi
    for tool in memcheck racecheck; do
        echo "== $tool"
        timeout 300 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 "$dir/check" "$folder"/cases/* > "$folder/log" 2>&1 || status=1
        grep -E "^=========|FAILED|cases," "$folder/log" | head -40
    done
    return "$status"
}

"$1"
