//! The driver API: the fatbin, one loaded library a process, launches on torch's stream.
//!
//! The fatbin is part of the binary and the driver is looked for only when a tensor is on a device, so the same binary
//! loads where there is neither. Torch owns contexts, streams and memory; this file borrows them.

use super::{Launch, kernel_names};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::ptr::null_mut;
use std::sync::{Mutex, OnceLock};

mod resources {
    include!(concat!(env!("OUT_DIR"), "/resources.rs"));
}

#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// SASS and PTX of every kernel; the driver wants it aligned.
static FATBIN: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

fn error(op: &'static str, doing: &str, code: sys::CUresult) -> Error {
    let mut text = std::ptr::null();
    // SAFETY: the driver writes a pointer to its own constant string, or leaves null.
    let described = unsafe { sys::cuGetErrorString(code, &mut text) };
    let words = if described == sys::CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: a constant string of the driver, ended by a zero.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    } else {
        "no description".into()
    };
    Error::Cuda {
        op,
        what: format!("{doing}: {words} ({code:?})"),
    }
}

fn checked(op: &'static str, doing: &str, code: sys::CUresult) -> Result<()> {
    if code == sys::CUresult::CUDA_SUCCESS {
        Ok(())
    } else {
        Err(error(op, doing, code))
    }
}

/// What is kept of a device for the life of the process.
struct Ready {
    context: sys::CUcontext,
    processors: usize,
    functions: HashMap<String, sys::CUfunction>,
}

// SAFETY: the driver's handles may be used from any thread, and are never destroyed.
unsafe impl Send for Ready {}
// SAFETY: as above; nothing here changes after it was made.
unsafe impl Sync for Ready {}

/// Makes a device's context current until dropped: launches go to the device of their tensors, whichever is current.
struct Current;

impl Current {
    fn of(op: &'static str, context: sys::CUcontext) -> Result<Self> {
        // SAFETY: `context` is a retained primary context.
        checked(op, "cuCtxPushCurrent", unsafe {
            sys::cuCtxPushCurrent_v2(context)
        })?;
        Ok(Current)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: pops what `of` pushed; there is nothing to do about a failure here.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
    }
}

/// Loading is not part of what is being recorded where a stream of this thread is captured in a graph.
struct Uncaptured(sys::CUstreamCaptureMode);

impl Uncaptured {
    fn new() -> Self {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges this thread's mode with the one in `mode`.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
        Uncaptured(mode)
    }
}

impl Drop for Uncaptured {
    fn drop(&mut self) {
        // SAFETY: puts back the mode that `new` found.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

/// The device, with every kernel loaded: the first call on a device pays for it, and none after it, captured or not.
fn ready(op: &'static str, device: i32) -> Result<&'static Ready> {
    static DEVICES: OnceLock<Mutex<HashMap<i32, &'static Ready>>> = OnceLock::new();
    let devices = DEVICES.get_or_init(Mutex::default);
    let mut devices = devices
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(ready) = devices.get(&device) {
        return Ok(ready);
    }
    // SAFETY: looks the library up, nothing more.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Cuda {
            op,
            what: "the NVIDIA driver library (libcuda) was not found".into(),
        });
    }
    let _uncaptured = Uncaptured::new();
    // Leaked on purpose: torch keeps the primary context for as long as the process lives.
    let ready: &'static Ready = Box::leak(Box::new(load(op, device)?));
    devices.insert(device, ready);
    Ok(ready)
}

fn attribute(op: &'static str, device: i32, which: sys::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: writes one int; `device` is an ordinal that cuDeviceGet accepted.
    checked(op, "cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&mut value, which, device)
    })?;
    Ok(value)
}

fn load(op: &'static str, ordinal: i32) -> Result<Ready> {
    use sys::CUdevice_attribute as Attribute;
    let mut device = 0;
    // SAFETY: writes the handle.
    checked(op, "cuDeviceGet", unsafe {
        sys::cuDeviceGet(&mut device, ordinal)
    })?;
    let mut context = null_mut();
    // SAFETY: writes the handle of the primary context, torch's own, and holds it for good.
    checked(op, "cuDevicePrimaryCtxRetain", unsafe {
        sys::cuDevicePrimaryCtxRetain(&mut context, device)
    })?;
    let _current = Current::of(op, context)?;
    let library = library(op, device)?;
    let largest = attribute(
        op,
        device,
        Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
    )?;
    let mut functions = HashMap::new();
    for name in kernel_names() {
        let symbol = CString::new(name.as_str()).map_err(|_| Error::Internal {
            op,
            what: format!("{name:?} is not a symbol"),
        })?;
        let (mut kernel, mut function) = (null_mut(), null_mut());
        // SAFETY: `symbol` ends with a zero; the driver writes the handle.
        checked(op, &name, unsafe {
            sys::cuLibraryGetKernel(&mut kernel, library, symbol.as_ptr())
        })
        .map_err(|found| no_code(op, device, found))?;
        // SAFETY: a kernel of this library; its code is loaded into the current context here, not at the first launch.
        checked(op, &name, unsafe {
            sys::cuKernelGetFunction(&mut function, kernel)
        })
        .map_err(|found| no_code(op, device, found))?;
        let mut used = 0;
        // SAFETY: writes one int for a function of the current context.
        checked(op, &name, unsafe {
            sys::cuFuncGetAttribute(
                &mut used,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
                function,
            )
        })?;
        // A block gets more than 48 KB only after this; all kernels stay below 99 KB.
        // SAFETY: a function of the current context.
        checked(op, &name, unsafe {
            sys::cuFuncSetAttribute(
                function,
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                largest - used,
            )
        })?;
        functions.insert(name, function);
    }
    let processors = attribute(
        op,
        device,
        Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
    )?;
    Ok(Ready {
        context,
        processors: processors.max(1) as usize,
        functions,
    })
}

/// The fatbin as the driver's library: one for all devices.
fn library(op: &'static str, device: i32) -> Result<sys::CUlibrary> {
    struct Handle(sys::CUlibrary);
    // SAFETY: a handle of the driver, never unloaded.
    unsafe impl Send for Handle {}
    // SAFETY: as above.
    unsafe impl Sync for Handle {}
    static LIBRARY: OnceLock<Handle> = OnceLock::new();
    if let Some(handle) = LIBRARY.get() {
        return Ok(handle.0);
    }
    let mut library = null_mut();
    // SAFETY: FATBIN is a whole fatbin, aligned, and lives as long as the process; no options.
    checked(op, "loading the kernels", unsafe {
        sys::cuLibraryLoadData(
            &mut library,
            FATBIN.0.as_ptr().cast(),
            null_mut(),
            null_mut(),
            0,
            null_mut(),
            null_mut(),
            0,
        )
    })
    .map_err(|found| no_code(op, device, found))?;
    Ok(LIBRARY.get_or_init(|| Handle(library)).0)
}

/// Adds the device and what the binary holds to a failure to load: the two differ, most likely.
fn no_code(op: &'static str, device: i32, found: Error) -> Error {
    use sys::CUdevice_attribute as Attribute;
    let version = |which| attribute(op, device, which).unwrap_or(-1);
    let (major, minor) = (
        version(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
        version(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
    );
    let Error::Cuda { what, .. } = found else {
        return found;
    };
    Error::Cuda {
        op,
        what: format!(
            "{what}; cuda:{device} has compute capability {major}.{minor}, this build has code for {}",
            resources::ARCHITECTURES
        ),
    }
}

/// What the compiler reported: (kernel, architecture, registers, bytes spilled, bytes of static shared memory).
pub fn resources() -> &'static [(&'static str, &'static str, u32, u32, u32)] {
    resources::RESOURCES
}

/// Multiprocessors of a device.
pub fn processors(op: &'static str, device: i32) -> Result<usize> {
    Ok(ready(op, device)?.processors)
}

/// Launches on `stream`, a CUstream of the device's primary context, and does not wait.
///
/// # Safety
/// As [`super::Machine::launch`], and `stream` is a stream of this device.
pub unsafe fn launch(
    op: &'static str,
    device: i32,
    stream: *mut c_void,
    launch: &Launch<'_>,
) -> Result<()> {
    let ready = ready(op, device)?;
    let Some(&function) = ready.functions.get(launch.kernel) else {
        return Err(Error::Internal {
            op,
            what: format!("no kernel is called {}", launch.kernel),
        });
    };
    let _current = Current::of(op, ready.context)?;
    let mut params = [launch.params.cast_mut()];
    let [x, y, z] = launch.grid.map(|n| n as u32);
    // SAFETY: the function belongs to the current context; its one parameter has the kernel's type (the caller's
    // promise), and the driver copies it before it returns.
    checked(op, launch.kernel, unsafe {
        sys::cuLaunchKernel(
            function,
            x,
            y,
            z,
            launch.threads as u32,
            1,
            1,
            launch.shared as u32,
            stream.cast(),
            params.as_mut_ptr(),
            null_mut(),
        )
    })
}
