//! Tables on standard output: columns as wide as their widest cell, two blanks between.

use std::fmt;

/// Rows under a heading.
#[derive(Debug)]
pub(crate) struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(heading: &[&'static str]) -> Self {
        Self {
            heading: heading.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; it has as many cells as the heading.
    pub(crate) fn push(&mut self, row: Vec<String>) {
        debug_assert_eq!(row.len(), self.heading.len());
        self.rows.push(row);
    }

    fn widths(&self) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.max().unwrap_or(0).max(self.heading[column].len())
        };
        (0..self.heading.len()).map(width).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let mut line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for (cell, width) in cells.zip(&widths) {
                text.push_str(&format!("{cell:<width$}  "));
            }
            writeln!(f, "{}", text.trim_end())
        };
        line(&mut self.heading.iter().copied())?;
        self.rows
            .iter()
            .try_for_each(|row| line(&mut row.iter().map(String::as_str)))
    }
}

/// Text from outside, safe on a terminal and in one line: control characters become blanks, and no more than
/// `chars_max` characters are kept.
pub(crate) fn one_line(text: &str, chars_max: usize) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    let mut kept: String = text.chars().take(chars_max).map(clean).collect();
    if text.chars().nth(chars_max).is_some() {
        kept.push('…');
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["ID", "STATE"]);
        table.push(vec!["longer".into(), "x".into()]);
        table.push(vec!["é".into(), "y".into()]);
        assert_eq!(table.to_string(), "ID      STATE\nlonger  x\né       y\n");
    }

    #[test]
    fn text_from_outside_stays_in_its_line() {
        assert_eq!(one_line("a\x1b[2J\nb", 10), "a [2J b");
        assert_eq!(one_line("abcdef", 3), "abc…");
        assert_eq!(one_line("abc", 3), "abc");
    }
}
