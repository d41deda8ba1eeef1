//! Devices of the kernel's device mapper. Hosts need not have it: these tests are for the small guest of the lab
//! (`tools/lab test --small`), one after the other; [`refusals`] are for the hosts that have none.
//!
//! [`readme`] what go-dmflakey promises; [`modes`] what each mode does, and for how long; [`cut`] power failures under
//! programs; [`layers`] a mount on top, delays and the log of writes; [`teardown`] that nothing stays and nothing else
//! goes. By [`bench`], which checks at the end of each that the machine is as it was.

mod bench;
mod cut;
mod layers;
mod modes;
mod readme;
mod refusals;
mod teardown;

use crate::support::sh;

/// A mapping in the kernel over a file that has no name.
struct Mapping(&'static str);

impl Mapping {
    /// A dm-flakey that is never up, with these features.
    fn never_up(name: &'static str, features: &str) -> Mapping {
        // The loop device is let go at once, and goes with the mapping.
        let made = sh(&format!(
            "image=$(mktemp); truncate -s 16M $image; loop=$(losetup --show -f $image); rm $image
             dmsetup create {name} --table \"0 32768 flakey $loop 0 0 3600 {features}\" || failed=1
             losetup -d $loop; exit ${{failed:-0}}"
        ));
        assert_eq!(made.code, 0, "{made:?}");
        Mapping(name)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let removed = sh(&format!("dmsetup remove {}", self.0));
        assert!(removed.code == 0 || std::thread::panicking(), "{removed:?}");
    }
}

#[test]
#[ignore = "needs device mapper: tools/lab test --small"]
fn the_guest_has_a_flakey_device() {
    let mapping = Mapping::never_up("nemesisfs-first", "1 error_writes");
    let read = sh("dd if=/dev/mapper/nemesisfs-first of=/dev/null bs=4k count=1 iflag=direct");
    assert_eq!(read.code, 0, "{read:?}");
    let written = sh("dd if=/dev/zero of=/dev/mapper/nemesisfs-first bs=4k count=1 oflag=direct");
    assert!(written.code == 1 && written.err.contains("Input/output error"), "{written:?}");
    drop(mapping);
    let left = sh("losetup --list --noheadings; dmsetup ls");
    assert_eq!(left.out, "No devices found\n", "{left:?}");
}
