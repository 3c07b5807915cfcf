//! Any bytes as a first record and as an answer: without the key nothing gets through.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tsugi_kpool::sideband::frame::Opening;
use tsugi_kpool::sideband::session::{Dialling, Key, accept};

fuzz_target!(|data: &[u8]| {
    let key = Key::new([9; 32]);
    let own = Opening {
        job: 1,
        epoch: 0,
        from: 1,
        to: 0,
        boot: 3,
    };
    assert!(accept(&key, &own, data).is_err());
    if let Ok((dialling, _)) = Dialling::start(
        &key,
        Opening {
            from: 0,
            to: 1,
            ..own
        },
    ) {
        assert!(dialling.finish(data).is_err());
    }
});
