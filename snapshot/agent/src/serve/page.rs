//! Lists in pages: `n` and `last` of a query, and the `Link` to the next page (OCI distribution specification 1.1, "Listing
//! Tags"; the catalog of Docker's registry has the same).

/// The most names of a page, and as many as there are unless a number is asked for.
const NAMES_MAX: usize = 1000;

/// The part of a list that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    names_max: usize,
    /// The name behind which it begins.
    after: String,
}

/// A query that asks for no page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadPage;

/// Names of a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Names<'l> {
    pub(super) names: Vec<&'l str>,
    /// The query of the next page, if there is one.
    pub(super) next: Option<String>,
}

impl Page {
    /// Reads a request's query. Whatever else is in it plays no part.
    pub(super) fn parse(query: Option<&str>) -> Result<Self, BadPage> {
        let mut page = Self {
            names_max: NAMES_MAX,
            after: String::new(),
        };
        let fields = query.unwrap_or_default().split('&');
        for (field, value) in fields.filter_map(|field| field.split_once('=')) {
            match field {
                "n" => page.names_max = value.parse::<usize>().map_err(|_| BadPage)?.min(NAMES_MAX),
                "last" => page.after = unescaped(value).ok_or(BadPage)?,
                _ => {}
            }
        }
        Ok(page)
    }

    /// Cuts the page out of a list, which is sorted as bytes are.
    pub(super) fn of<'l>(&self, list: impl IntoIterator<Item = &'l str>) -> Names<'l> {
        let mut rest = list.into_iter().skip_while(|name| *name <= self.after.as_str());
        let names: Vec<&str> = rest.by_ref().take(self.names_max).collect();
        // Of a page of nothing there is no next one. Names and tags have no character that a query escapes.
        let last = names.last().filter(|_| rest.next().is_some());
        let next = last.map(|last| format!("n={}&last={last}", self.names_max));
        Names { names, next }
    }
}

/// A value of a query as it was before it was escaped (RFC 3986 §2.1).
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = rest
            .get(..2)
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: [&str; 3] = ["db", "team/web", "web"];

    fn page(query: &str) -> (Vec<&'static str>, Option<String>) {
        let Names { names, next } = Page::parse(Some(query)).unwrap().of(LIST);
        (names, next)
    }

    #[test]
    fn pages_follow_one_another_to_the_end() {
        let next = |text: &str| Some(text.to_owned());
        assert_eq!(Page::parse(None).unwrap().of(LIST).names, LIST);
        assert_eq!(page("n=2"), (vec!["db", "team/web"], next("n=2&last=team/web")));
        assert_eq!(page("n=2&last=team/web"), (vec!["web"], None));
        assert_eq!(page("last=team%2Fweb&n=1"), (vec!["web"], None));
        assert_eq!(page("n=3"), (LIST.to_vec(), None));
        assert_eq!(page("n=0"), (vec![], None));
        // One that is gone by now, and what no server knows.
        assert_eq!(page("last=nobody&strange=1"), (vec!["team/web", "web"], None));
        assert_eq!(page("last=zzz"), (vec![], None));
    }

    #[test]
    fn no_page_is_longer_than_the_longest() {
        let names: Vec<String> = (0..2 * NAMES_MAX).map(|number| format!("{number:05}")).collect();
        for query in ["", "n=5000"] {
            let page = Page::parse(Some(query)).unwrap();
            assert_eq!(page.of(names.iter().map(String::as_str)).names.len(), NAMES_MAX);
        }
    }

    #[test]
    fn queries_that_ask_for_no_page_are_refused() {
        for query in ["n=x", "n=-1", "n=", "last=%2", "last=%+f", "last=%zz", "last=%ff"] {
            assert_eq!(Page::parse(Some(query)), Err(BadPage), "{query}");
        }
    }
}
