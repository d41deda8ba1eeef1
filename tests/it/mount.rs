//! The life of a mount.

use crate::support::Mounted;

#[test]
fn a_mount_shows_the_backing_directory_and_leaves_nothing() {
    let mounted = Mounted::new();
    std::fs::write(mounted.path("a"), "hello").unwrap();
    assert_eq!(std::fs::read_to_string(mounted.backing.join("a")).unwrap(), "hello");
    mounted.end();
}
