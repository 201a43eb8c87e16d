//! Words of a command line that a message advises: whoever copies it gives what was meant, and nothing else.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// What a shell takes as it is, besides letters and digits.
const PLAIN: &str = "%+,-./:=@_";

/// A path or a name as a shell reads it, as one word: as it is where nothing in it means anything to a shell, else in
/// quotes. In one line, and without control characters.
#[must_use]
pub fn shell_word(text: impl AsRef<OsStr>) -> String {
    let text = text.as_ref();
    match text.to_str() {
        Some(text) if is_plain(text) => text.to_owned(),
        Some(text) if !text.contains(char::is_control) => format!("'{}'", text.replace('\'', r"'\''")),
        _ => escaped(text.as_bytes()),
    }
}

fn is_plain(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || PLAIN.contains(c))
}

/// `$'…'`, in which a shell reads `\\ddd`, three octal digits, as that byte (POSIX.1-2024 §2.2.4).
fn escaped(bytes: &[u8]) -> String {
    let escape = |&byte: &u8| match byte {
        b'\'' | b'\\' => format!("\\{}", char::from(byte)),
        b' '..=b'~' => char::from(byte).to_string(),
        // Three octal digits end by themselves; more hexadecimal ones may follow.
        _ => format!("\\{byte:03o}"),
    };
    format!("$'{}'", bytes.iter().map(escape).collect::<String>())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn words_are_quoted_only_where_a_shell_would_read_something_else() {
        for plain in [
            "/srv/web-v1",
            "./web_1.2",
            "http://10.0.0.1:5000/web@sha256:0",
            "büro",
        ] {
            assert_eq!(shell_word(plain), plain);
        }
        assert_eq!(shell_word("/srv/my images"), "'/srv/my images'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word("a\nb"), r"$'a\012b'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn a_shell_reads_what_was_meant() {
        let strange = OsStr::from_bytes(b"\xff'\x1b1\\ ");
        let words = ["$HOME", "a;b", "`x`", "it's", "*", "~", "a\nb", "\"", "&"].map(OsStr::new);
        for word in words.into_iter().chain([strange]) {
            let line = format!("printf %s {}", shell_word(word));
            let heard = Command::new("bash").args(["-c", &line]).output().unwrap();
            assert_eq!(OsStr::from_bytes(&heard.stdout), word, "{line}");
        }
    }
}
