//! Memory that the allocator keeps though nobody uses it.

/// Gives the system back what the C library's allocator keeps free: reading a model's metadata and
/// loading it leaves megabytes of that. Does nothing where the C library has no such function.
pub(crate) fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
