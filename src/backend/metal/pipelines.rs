//! Each text of kernels, compiled once for each device when a kernel of it is first launched; each pipeline made once.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use candle_core::MetalDevice;
use candle_core::metal_backend::DeviceId;
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{ComputePipeline, Library};
use objc2_metal::MTLCompileOptions;

use super::plan::{Launch, Source};
use crate::{Error, Result};

/// What one device has of one text. A library that does not compile is not tried again.
struct Kernels {
    library: Result<Library, String>,
    pipelines: Mutex<HashMap<String, Result<ComputePipeline, String>>>,
}

type ByDevice = HashMap<(DeviceId, Source), Arc<Kernels>>;

static KERNELS: LazyLock<Mutex<ByDevice>> = LazyLock::new(Mutex::default);

/// The pipeline of a launch.
///
/// # Errors
/// [`Error::Device`] with the compiler's text, or with the threads that the pipeline allows where the launch wants more.
pub fn pipeline(device: &MetalDevice, launch: &Launch) -> Result<ComputePipeline> {
    let kernels = kernels_of(device, launch.source);
    let library = kernels.library.as_ref().map_err(|text| {
        let file = launch.source.file();
        problem(format!("{file} does not compile: {text}"))
    })?;
    let mut pipelines = kernels.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
    let pipeline = pipelines.entry(launch.kernel.clone()).or_insert_with(|| {
        let function = library.get_function(&launch.kernel, None);
        function.and_then(|function| device.new_compute_pipeline_state_with_function(&function)).map_err(text_of)
    });
    let pipeline = pipeline.as_ref().map_err(|text| problem(format!("no pipeline for {}: {text}", launch.kernel)))?;
    let most = pipeline.max_total_threads_per_threadgroup();
    if launch.threads > most {
        let Launch { kernel, threads, .. } = launch;
        return Err(problem(format!("{kernel} is launched with {threads} threads a threadgroup, but allows {most}")));
    }
    Ok(pipeline.clone())
}

fn kernels_of(device: &MetalDevice, source: Source) -> Arc<Kernels> {
    // Held while compiling: a second thread waits for the library instead of compiling it too.
    let mut all = KERNELS.lock().unwrap_or_else(PoisonError::into_inner);
    let kernels = all.entry((device.id(), source)).or_insert_with(|| {
        let library = device.new_library_with_source(source.text(), Some(&options())).map_err(text_of);
        Arc::new(Kernels { library, pipelines: Mutex::default() })
    });
    kernels.clone()
}

/// Without fast math, which is on by default: it may assume that no value is NaN, and a diverged loss must stay visible.
/// It would speed up divisions and transcendental functions, which wait for memory here; products and sums are contracted
/// either way.
fn options() -> objc2::rc::Retained<MTLCompileOptions> {
    let options = MTLCompileOptions::new();
    // Its successor, the math mode, needs macOS 15; this is understood by all.
    #[allow(deprecated)]
    options.setFastMathEnabled(false);
    options
}

/// The whole text: Display leaves some of it out.
fn text_of(error: MetalKernelError) -> String {
    match error {
        MetalKernelError::FailedToCreatePipeline(text)
        | MetalKernelError::LoadLibraryError(text)
        | MetalKernelError::LoadFunctionError(text) => text,
        other => other.to_string(),
    }
}

fn problem(problem: String) -> Error {
    Error::Device { device: "metal".to_string(), problem }
}
