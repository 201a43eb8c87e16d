#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = runnel_readers::working_set(bytes);
});
