//! Claims on hosts without device mapper: what is missing is said, with exit 5 and 501, and nothing is changed.

use std::path::Path;

use serde_json::json;

use super::bench::Bench;
use crate::support::Mounted;

/// Hosts that have it are those of the other tests.
fn has_device_mapper() -> bool {
    Path::new("/sys/class/misc/device-mapper").exists()
        || Path::new("/lib/modules").join(release()).join("kernel/drivers/md").exists()
}

fn release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("the kernel's name").trim().to_string()
}

#[test]
fn a_host_without_device_mapper_says_so_and_nothing_is_made() {
    if has_device_mapper() {
        return;
    }
    let mounted = Mounted::new();
    let image = mounted.aside("images").join("d0.img");
    let body = json!({"image": image, "size": "64MiB", "mountpoint": mounted.aside("images").join("mnt")});
    let answer = mounted.http("PUT", "/v1/devices/d0", Some(&body));
    assert_eq!((answer.status, &answer.body["code"]), (501, &json!("not_supported")), "{answer:?}");
    assert!(answer.body["hint"].is_string(), "{answer:?}");
    let words = ["device", "create", "d0", "--image", image.to_str().expect("a path"), "--size", "64MiB"];
    let said = mounted.try_cli(&words);
    assert_eq!(said.code, 5, "{said:?}");
    assert!(said.err.contains("device mapper") || said.err.contains("dmsetup"), "{said:?}");
    assert_eq!(std::fs::read_dir(image.parent().expect("a directory")).expect("the directory").count(), 0);
    let listed = mounted.http("GET", "/v1/devices", None);
    assert_eq!((listed.status, &listed.body["devices"]), (200, &json!([])));
    assert_eq!(listed.body["host"]["supported"], false);
    mounted.end();
}

#[test]
fn what_makes_no_sense_is_refused_on_every_host_and_what_is_not_there_is_removed() {
    let mounted = Mounted::new();
    let put = |name: &str, body| mounted.http("PUT", &format!("/v1/devices/{name}"), Some(&body));
    for (body, pointer) in [
        (json!({}), "#/image"),
        (json!({"image": "d0.img", "size": "1GiB"}), "#/image"),
        (json!({"image": "/d0.img", "size": "1GiB", "filesystem": "ext5"}), "#/filesystem"),
        (json!({"imgae": "/d0.img"}), "#/imgae"),
    ] {
        let answer = put("d0", body);
        assert_eq!((answer.status, &answer.body["errors"][0]["pointer"]), (422, &json!(pointer)), "{answer:?}");
    }
    assert_eq!(put("..", json!({"image": "/d0.img", "size": "1GiB"})).status, 422);
    assert_eq!(mounted.http("GET", "/v1/devices/d0", None).status, 404);
    assert_eq!(mounted.http("PUT", "/v1/devices/d0/mode", Some(&json!({"mode": "drop_writes"}))).status, 404);
    assert_eq!(mounted.http("POST", "/v1/devices/d0/cut", None).status, 404);
    assert_eq!(mounted.http("DELETE", "/v1/devices/d0", None).status, 204);
    assert_eq!(mounted.try_cli(&["device", "mode", "d0", "drop_writes"]).code, 4);
    let said = mounted.try_cli(&["device", "remove", "d0"]);
    assert!(said.code == 0 && said.out.contains("not there"), "{said:?}");
    mounted.end();
}

#[test]
fn a_daemon_is_started_for_the_question_and_ends_by_itself() {
    let bench = Bench::new();
    let said = bench.cli(&["device", "status"]);
    assert!(said.starts_with("host: "), "{said}");
    bench.end();
}
