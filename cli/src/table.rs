//! Tables for people.

use std::io::Write;

use anyhow::Result;
use palisade_profile::text::printable;
use time::{OffsetDateTime, UtcOffset, macros::format_description};

/// Prints `rows` under `heads`, columns as wide as they need to be. Hidden characters of a cell are made visible.
pub(crate) fn print(out: &mut impl Write, heads: &[&str], rows: &[Vec<String>]) -> Result<()> {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| printable(cell)).collect()).collect();
    let widths: Vec<usize> = heads
        .iter()
        .enumerate()
        .map(|(column, head)| {
            rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(head.chars().count())
        })
        .collect();
    line(out, &widths, heads.iter().copied())?;
    for row in &rows {
        line(out, &widths, row.iter().map(String::as_str))?;
    }
    Ok(())
}

/// Prints one row in columns of fixed widths; what is longer pushes the rest. Hidden characters of a cell are made visible.
pub(crate) fn line<'a>(
    out: &mut impl Write,
    widths: &[usize],
    cells: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let text: Vec<String> =
        cells.zip(widths).map(|(cell, width)| format!("{:<width$}", printable(cell))).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        let mut out = Vec::new();
        let cell = "a\u{1b}[2Jb\n\u{202e}\u{ad}".to_owned();
        print(&mut out, &["HEAD", "NEXT"], &[vec![cell, "x".to_owned()]]).unwrap();
        let shown = "a\\u{1b}[2Jb\\u{a}\\u{202e}\\u{ad}";
        let expected = format!("{:<1$}  NEXT\n{shown}  x\n", "HEAD", shown.len());
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn times_are_utc_with_milliseconds() {
        assert_eq!(moment(1_700_000_000_123_456_789), "2023-11-14 22:13:20.123");
    }
}
