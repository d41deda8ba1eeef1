//! The seeds of the fuzz targets, each through the function that the fuzzer calls: the short form of `tools/fuzz`.

#[path = "../../fuzz/src/lib.rs"]
mod targets;

use std::path::Path;

/// A name, and what is done with the bytes.
type Target = (&'static str, fn(&[u8]));

#[test]
fn each_seed_goes_through_its_target() {
    let targets: [Target; 3] = [("rule", targets::rule), ("terms", targets::terms), ("toml", targets::toml)];
    for (name, target) in targets {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus-seed").join(name);
        let files: Vec<_> = std::fs::read_dir(seeds).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() >= 5, "{name}: {files:?}");
        for file in files {
            println!("{}", file.display());
            target(&std::fs::read(&file).unwrap());
        }
    }
}
