//! An answer being read off a connection: its head, checked, and its body as far as it is wanted (RFC 9112).

use std::io;

use super::connection::Connection;

/// The longest head of an answer.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// The most fields of a head.
const FIELDS_MAX: usize = 64;

/// Bytes read at a time while a head is awaited: a head, and with it all of a small body.
const HEAD_READ_BYTES: usize = 8 << 10;

/// Interim answers (100, 103) that are skipped.
const INTERIM_MAX: usize = 4;

/// The longest line of a chunked body's framing, and the most of a trailer.
const LINE_BYTES_MAX: usize = 1 << 10;

/// What is read on, behind what was wanted, to keep a connection.
const READ_THROUGH_MAX: u64 = 256 << 10;

/// How an answer begins of who speaks nothing but TLS, and was sent something else (RFC 8446 §5.1).
const TLS_ALERT: u8 = 21;

/// Bytes skipped at a time.
const SKIP_BYTES: usize = 64 << 10;

/// The head of an answer.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: u16,
    fields: Vec<(String, Vec<u8>)>,
    /// Whether the connection is closed behind the body.
    closes: bool,
}

impl Head {
    /// The first field of that name, if it is text.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        let (_, value) = self
            .fields
            .iter()
            .find(|(found, _)| found.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(value).ok().map(str::trim)
    }

    /// All fields of that name that are text.
    pub(super) fn fields<'h>(&'h self, name: &'h str) -> impl Iterator<Item = &'h str> {
        self.fields
            .iter()
            .filter(move |(found, _)| found.eq_ignore_ascii_case(name))
            .filter_map(|(_, value)| std::str::from_utf8(value).ok())
    }

    /// The bytes that a `Content-Range` gives: first, last and the whole's length, where it is told.
    pub(super) fn content_range(&self) -> Option<(u64, u64, Option<u64>)> {
        let range = self.field("content-range")?.strip_prefix("bytes ")?;
        let (range, whole) = range.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        Some((
            first.trim().parse().ok()?,
            last.trim().parse().ok()?,
            whole.trim().parse().ok(),
        ))
    }
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// After so many bytes.
    Length(u64),
    /// Chunked; so many bytes are left of the current chunk.
    Chunked { left: u64, begun: bool },
    /// When the server closes.
    Close,
    /// It has ended.
    Done,
}

/// An answer whose head was read.
pub(super) struct Answer {
    pub(super) head: Head,
    connection: Connection,
    framing: Framing,
    body_bytes: u64,
}

impl Answer {
    /// Reads the head of an answer.
    pub(super) fn read(mut connection: Connection) -> io::Result<Self> {
        for _ in 0..INTERIM_MAX {
            let head = read_head(&mut connection)?;
            if (100..200).contains(&head.status) {
                continue;
            }
            let framing = framing(&head)?;
            return Ok(Self {
                head,
                connection,
                framing,
                body_bytes: 0,
            });
        }
        Err(malformed("too many interim answers"))
    }

    /// The body's length, where the head tells.
    pub(super) fn length(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// Reads some of the body; nothing at its end.
    pub(super) fn read_some(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        let left = match &mut self.framing {
            Framing::Done => return Ok(0),
            Framing::Length(left) => *left,
            Framing::Close => u64::MAX,
            Framing::Chunked { left: 0, .. } => match self.next_chunk()? {
                0 => return Ok(0),
                left => left,
            },
            Framing::Chunked { left, .. } => *left,
        };
        let bytes = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
        if bytes == 0 {
            self.framing = Framing::Done;
            return Ok(0);
        }
        let count = self.connection.read(&mut into[..bytes])?;
        self.body_bytes += count as u64;
        match &mut self.framing {
            Framing::Close if count == 0 => self.framing = Framing::Done,
            _ if count == 0 => return Err(cut_off()),
            Framing::Length(left) | Framing::Chunked { left, .. } => *left -= count as u64,
            Framing::Close | Framing::Done => {}
        }
        Ok(count)
    }

    /// Fills `into`, or fails.
    pub(super) fn read_exact(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < into.len() {
            match self.read_some(&mut into[at..])? {
                0 => return Err(cut_off()),
                count => at += count,
            }
        }
        Ok(())
    }

    /// Skips exactly so many bytes.
    pub(super) fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        let mut room = vec![0; SKIP_BYTES.min(usize::try_from(bytes).unwrap_or(SKIP_BYTES))];
        while bytes > 0 {
            let part = room.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            match self.read_some(&mut room[..part])? {
                0 => return Err(cut_off()),
                count => bytes -= count as u64,
            }
        }
        Ok(())
    }

    /// Reads the rest, which must be no more than `bytes_max`.
    pub(super) fn read_rest(&mut self, bytes_max: u64) -> io::Result<Vec<u8>> {
        let too_long = || malformed("its body is longer than such a thing can be");
        if self.length().is_some_and(|bytes| bytes > bytes_max) {
            return Err(too_long());
        }
        let mut body = Vec::new();
        let mut room = vec![0; HEAD_READ_BYTES];
        loop {
            match self.read_some(&mut room)? {
                0 => return Ok(body),
                count if (body.len() + count) as u64 > bytes_max => return Err(too_long()),
                count => body.extend_from_slice(&room[..count]),
            }
        }
    }

    /// The connection for the next request, if what is left of the body is little and it stays open.
    pub(super) fn finish(mut self) -> Option<Connection> {
        let little = match self.framing {
            Framing::Length(left) => left <= READ_THROUGH_MAX,
            Framing::Chunked { .. } | Framing::Done => true,
            Framing::Close => false,
        };
        if self.head.closes || !little {
            return None;
        }
        let mut room = [0; 4096];
        let mut through = 0;
        while through <= READ_THROUGH_MAX {
            match self.read_some(&mut room).ok()? {
                // Bytes behind an answer are not part of any.
                0 if !self.connection.ahead.is_empty() => return None,
                0 => {
                    self.connection.used = true;
                    self.connection.widen(self.body_bytes);
                    return Some(self.connection);
                }
                count => through += count as u64,
            }
        }
        None
    }

    /// Reads up to the next chunk's bytes, and how many there are: none at the end.
    fn next_chunk(&mut self) -> io::Result<u64> {
        if matches!(self.framing, Framing::Chunked { begun: true, .. }) && !self.line()?.is_empty() {
            return Err(malformed("a chunk of its body does not end where it should"));
        }
        let line = self.line()?;
        let digits = line.split(|c| *c == b';').next().unwrap_or_default().trim_ascii();
        let left = std::str::from_utf8(digits)
            .ok()
            .filter(|digits| digits.bytes().all(|c| c.is_ascii_hexdigit()))
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .ok_or_else(|| malformed("a chunk of its body has no length"))?;
        if left == 0 {
            let mut trailer = 0;
            loop {
                match self.line()?.len() {
                    0 => break,
                    bytes if trailer + bytes > LINE_BYTES_MAX => {
                        return Err(malformed("its trailer is too long"));
                    }
                    bytes => trailer += bytes,
                }
            }
            self.framing = Framing::Done;
            return Ok(0);
        }
        self.framing = Framing::Chunked { left, begun: true };
        Ok(left)
    }

    /// A line of the framing, without its end.
    fn line(&mut self) -> io::Result<Vec<u8>> {
        let ahead = |connection: &Connection| connection.ahead.iter().position(|c| *c == b'\n');
        loop {
            match ahead(&self.connection) {
                Some(end) if end <= LINE_BYTES_MAX => {
                    let mut line: Vec<u8> = self.connection.ahead.drain(..=end).collect();
                    line.pop();
                    line.pop_if(|c| *c == b'\r');
                    return Ok(line);
                }
                None if self.connection.ahead.len() <= LINE_BYTES_MAX => {
                    if !self.connection.read_ahead(LINE_BYTES_MAX)? {
                        return Err(cut_off());
                    }
                }
                _ => return Err(malformed("a line of its framing is too long")),
            }
        }
    }
}

fn read_head(connection: &mut Connection) -> io::Result<Head> {
    loop {
        if let Some((head, bytes)) = parse_head(&connection.ahead)? {
            connection.ahead.drain(..bytes);
            return Ok(head);
        }
        if connection.ahead.len() >= HEAD_BYTES_MAX {
            return Err(malformed("its head is too long"));
        }
        if !connection.read_ahead(HEAD_READ_BYTES)? {
            return Err(cut_off());
        }
    }
}

fn parse_head(bytes: &[u8]) -> io::Result<Option<(Head, usize)>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let parsed = response.parse(bytes).map_err(|error| match bytes {
        [TLS_ALERT, ..] => malformed("it is TLS, so the images of this server begin with https://"),
        _ => io::Error::new(io::ErrorKind::InvalidData, error),
    })?;
    let httparse::Status::Complete(length) = parsed else {
        return Ok(None);
    };
    // RFC 9110 §15: others mean nothing, and three digits are all that the parser looks for.
    let status = response.code.filter(|status| (100..600).contains(status));
    let status = status.ok_or_else(|| malformed("its status is none"))?;
    let fields = response.headers.iter();
    let fields: Vec<_> = fields
        .map(|field| (field.name.to_owned(), field.value.to_vec()))
        .collect();
    let mut head = Head {
        status,
        fields,
        closes: false,
    };
    let says = |word: &str| {
        head.fields("connection")
            .flat_map(|value| value.split(','))
            .any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    head.closes = says("close") || (response.version == Some(0) && !says("keep-alive"));
    Ok(Some((head, length)))
}

/// How the body of an answer to `GET` ends (RFC 9112 §6.3).
fn framing(head: &Head) -> io::Result<Framing> {
    if matches!(head.status, 204 | 304) {
        return Ok(Framing::Done);
    }
    let mut codings = head.fields("transfer-encoding").peekable();
    if codings.peek().is_some() {
        return match codings.collect::<Vec<_>>()[..] {
            [only] if only.trim().eq_ignore_ascii_case("chunked") => Ok(Framing::Chunked {
                left: 0,
                begun: false,
            }),
            _ => Err(malformed("its transfer coding is not known")),
        };
    }
    let mut lengths = head.fields("content-length");
    match (lengths.next(), lengths.next()) {
        (None, _) => Ok(Framing::Close),
        (Some(length), None) if length.trim().bytes().all(|c| c.is_ascii_digit()) => {
            let length = length
                .trim()
                .parse()
                .map_err(|_| malformed("its length is absurd"))?;
            Ok(Framing::Length(length))
        }
        _ => Err(malformed("its length is not one number")),
    }
}

fn cut_off() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the server closed the connection too early",
    )
}

fn malformed(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_whose_status_is_none_of_http_is_refused() {
        for (status, is_one) in [
            ("006", false),
            ("099", false),
            ("200", true),
            ("599", true),
            ("600", false),
        ] {
            let answer = format!("HTTP/1.1 {status} OK\r\nContent-Length: 0\r\n\r\n");
            let read = Answer::read(Connection::of_bytes(answer.as_bytes()).unwrap());
            assert_eq!(read.is_ok(), is_one, "{status}");
        }
    }
}
