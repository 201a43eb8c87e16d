#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = runnel_readers::guest_channel(bytes);
});
