//! The `nemesisfs` program. All it does is in the library; see `cli` for the command line.

fn main() -> std::process::ExitCode {
    nemesisfs::cli::main()
}
