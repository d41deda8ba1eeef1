//! The documents cannot lie: their commands are run, the tests that they name exist.

use std::path::{Path, PathBuf};
use std::process::Command;

const DOCUMENTS: &[&str] = &[
    "README.md",
    "docs/api.md",
    "docs/architecture.md",
    "docs/cookbook.md",
    "docs/coredumps.md",
    "docs/devices.md",
    "docs/faults.md",
    "docs/faults/attr.md",
    "docs/faults/bad_sectors.md",
    "docs/faults/corrupt.md",
    "docs/faults/drop.md",
    "docs/faults/error.md",
    "docs/faults/kill.md",
    "docs/faults/latency.md",
    "docs/faults/misdirect.md",
    "docs/faults/short.md",
    "docs/faults/stall.md",
    "docs/faults/throttle.md",
    "docs/faults/torn.md",
    "docs/lab.md",
    "docs/performance.md",
    "docs/semantics.md",
    "docs/space.md",
    "docs/sweep.md",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let opening = format!("```{language}\n");
    text.split(&opening).skip(1).filter_map(|rest| Some(rest.split_once("\n```")?.0.to_string())).collect()
}

#[test]
fn every_shell_block_runs() {
    let program = PathBuf::from(crate::support::executable());
    let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default());
    let mut run = 0;
    for name in DOCUMENTS {
        for block in blocks(&text(name), "sh") {
            let dir = tempfile::tempdir().unwrap();
            let said = Command::new("sh")
                .args(["-euc", &block])
                .current_dir(dir.path())
                .env("PATH", &path)
                .env("NEMESISFS_RUNDIR", dir.path().join("run"))
                .output()
                .unwrap();
            if !said.status.success() {
                let _ = Command::new(&program).args(["umount", "--force"]).arg(dir.path().join("mnt")).output();
            }
            assert!(said.status.success(), "{name}:\n{block}\n{}", String::from_utf8_lossy(&said.stderr));
            let table = std::fs::read("/proc/self/mountinfo").unwrap();
            assert!(
                !String::from_utf8_lossy(&table).contains(dir.path().to_str().unwrap()),
                "{name}: its block leaves a mount"
            );
            run += 1;
        }
    }
    assert!(run >= 3);
}

#[test]
fn every_test_that_a_document_names_exists() {
    let mut named = 0;
    for name in DOCUMENTS {
        for word in text(name).split('`').filter(|word| word.contains("::") && !word.contains(' ')) {
            let (module, test) = word.rsplit_once("::").unwrap();
            if module.starts_with(char::is_uppercase) || module == "fault" {
                // A type or a module of the program.
                continue;
            }
            let file = root().join(format!("tests/it/{}.rs", module.replace("::", "/")));
            let Ok(source) = std::fs::read_to_string(&file) else {
                panic!("{name} names {word}: no {}", file.display())
            };
            assert!(source.contains(&format!("fn {test}(")), "{name} names {word}");
            named += 1;
        }
    }
    assert!(named > 20, "{named}");
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    for name in DOCUMENTS.iter().chain(&["CHANGELOG.md"]) {
        let text = text(name);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !link.starts_with("http") {
                let file = link.split('#').next().unwrap();
                let target = root().join(name).parent().unwrap().join(file);
                assert!(target.exists(), "{name}: {link}");
            }
        }
    }
}

#[test]
fn every_route_and_operation_is_in_the_document() {
    let api = text("docs/api.md");
    let routes = text("src/control/mod.rs") + &text("src/control/devices.rs");
    for route in routes.split(".route(\"").skip(1).filter_map(|rest| rest.split('"').next()) {
        assert!(api.contains(route), "{route}");
    }
    for word in nemesisfs::fault::OpSet::words() {
        assert!(api.contains(word), "{word}");
    }
}

#[test]
fn every_kind_has_a_page_with_its_attributes_and_an_example() {
    for kind in nemesisfs::fault::kind::KINDS.iter().filter(|kind| kind.built) {
        let name = format!("docs/faults/{}.md", kind.word);
        assert!(DOCUMENTS.contains(&name.as_str()), "{name}");
        let page = text(&name);
        for attribute in kind.attributes {
            assert!(page.contains(&format!("`{attribute}`")), "{name}: {attribute}");
        }
        assert_eq!(blocks(&page, "sh").len(), 1, "{name}: its example");
        assert!(text("docs/faults.md").contains(&format!("(faults/{}.md)", kind.word)), "{name}");
    }
}
