//! Tables for people.

use std::io::Write;

use anyhow::Result;
use time::{OffsetDateTime, UtcOffset, macros::format_description};

/// Prints `rows` under `heads`, columns as wide as they need to be.
pub(crate) fn print(out: &mut impl Write, heads: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(column, head)| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(head.chars().count())
        })
        .collect();
    line(out, &widths, heads.iter().copied())?;
    for row in rows {
        line(out, &widths, row.iter().map(String::as_str))?;
    }
    Ok(())
}

/// Prints one row in columns of fixed widths; what is longer pushes the rest.
pub(crate) fn line<'a>(
    out: &mut impl Write,
    widths: &[usize],
    cells: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let text: Vec<String> = cells.zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
    writeln!(out, "{}", text.join("  ").trim_end())?;
    Ok(())
}

/// A time for people, in UTC with milliseconds.
pub(crate) fn moment(nanoseconds: u64) -> String {
    if nanoseconds == 0 {
        return "-".to_owned();
    }
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second].[subsecond digits:3]");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(nanoseconds))
        .ok()
        .and_then(|time| time.to_offset(UtcOffset::UTC).format(&format).ok())
        .unwrap_or_else(|| nanoseconds.to_string())
}

/// Text that a container controls, safe to print on a terminal: control characters are escaped.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .flat_map(|character| {
            let escaped: Vec<char> = if character.is_control() || is_direction_mark(character) {
                character.escape_unicode().collect()
            } else {
                vec![character]
            };
            escaped
        })
        .collect()
}

/// Marks that make a terminal show text in another order than it has.
fn is_direction_mark(character: char) -> bool {
    matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{202e}"), "a\\u{1b}[2Jb\\u{a}\\u{202e}");
    }

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(moment(1_700_000_000_123_456_789), "2023-11-14 22:13:20.123");
    }
}
