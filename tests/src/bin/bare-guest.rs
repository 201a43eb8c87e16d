//! Prints where the bare guest lies that was built with this: for `make try`.

fn main() {
    println!("{}", runnel_tests::bare_guest().display());
}
