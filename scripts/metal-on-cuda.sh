#!/usr/bin/env bash
# The Metal kernels on an NVIDIA GPU: the same texts as on a Mac, with 32-wide warps as simdgroups.
#   scripts/metal-on-cuda.sh build DIR   needs nvcc and Rust, no GPU; makes the program and its cases in DIR
#   scripts/metal-on-cuda.sh run DIR     needs a GPU and compute-sanitizer; results, memcheck, racecheck
# The cases are those of tests/metal_host.rs, with what the CPU gave for them.
set -euo pipefail
dir=$(realpath -m "$2")

compile() { # NAME ARGUMENT...: check.cu to $dir/NAME
    local library name=$1
    shift
    library=$(find -L "$(dirname "$(command -v nvcc)")/.." -name libcudart_static.a -printf '%h\n' -quit)
    nvcc -std=c++17 -O1 -w -lineinfo "$@" -I tests/metal_host/cuda -cudart static -L "$library" \
        -cudadevrt none --threads 2 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
        tests/metal_host/cuda/check.cu -o "$dir/$name"
}

text() { # NAME FILE...: a library's text, for nvcc. Attributes and address spaces mean nothing to it.
    local name=$1
    shift
    (cd src/backend && cat "$@") | sed -E 's/\[\[[^]]*\]\]//g; s/\b(device|threadgroup|constant|thread)\b//g' > "$dir/$name.cu"
}

build() {
    cd "$(dirname "$0")/.."
    mkdir -p "$dir/cases"
    # As `Source::text` of src/backend/metal/plan.rs puts them together.
    text lora kernels.metal
    text decoder metal/common.metal metal/decoder.metal
    text training metal/common.metal metal/training.metal
    text attention metal/common.metal metal/attention_tiles.metal metal/attention.metal
    text dequantize metal/common.metal metal/dequantize.metal
    compile check -DLORA="\"$dir/lora.cu\"" -DDECODER="\"$dir/decoder.cu\"" -DTRAINING="\"$dir/training.cu\"" \
        -DATTENTION="\"$dir/attention.cu\"" -DDEQUANTIZE="\"$dir/dequantize.cu\""
    # The LoRA op's f32 kernels without their first barrier: racecheck must see it.
    sed '/^ADAPTER(f16, f32/,$d' "$dir/lora.cu" | sed '0,/threadgroup_barrier/{/threadgroup_barrier/d}' > "$dir/planted.cu"
    compile planted -DLORA="\"$dir/planted.cu\"" -DLORA_ALONE
    rm "$dir"/*.cu
    METAL_HOST_CASES="$dir/cases" cargo test --locked --test metal_host -- agrees_with_the_reference
    XZ_OPT=-9 tar cJf "$dir/cases.tar.xz" -C "$dir" cases
    rm -r "$dir/cases"
}

sanitize() { # TOOL PROGRAM CASE...
    local tool=$1
    shift
    compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 3 "$@" > "$folder/log" 2>&1
}

run() {
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    local status=0
    tar xJf "$dir/cases.tar.xz" -C "$folder"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
    echo "== as it is"
    "$dir/check" "$folder"/cases/* || status=1
    if ! command -v compute-sanitizer > /dev/null; then
        echo "FAILED: there is no compute-sanitizer on PATH"
        return 1
    fi
    for tool in memcheck racecheck; do
        echo "== $tool"
        sanitize "$tool" "$dir/check" "$folder"/cases/* || status=1
        grep -E "^=========|FAILED" "$folder/log" | head -20
        grep -E "SUMMARY|cases," "$folder/log" || status=1
    done
    echo "== racecheck, with a barrier taken out: it must object"
    # 9 is the sanitizer's own status; the program's is 1 here, since it has kernels that these cases do not launch.
    local objection=0
    sanitize racecheck "$dir/planted" "$folder"/cases/m37*delta || objection=$?
    if [ "$objection" != 9 ]; then
        echo "FAILED: nothing was seen"
        status=1
    fi
    grep -E "SUMMARY" "$folder/log" || status=1
    [ "$status" = 0 ] && echo "All as it should be."
    return "$status"
}

"$1"
