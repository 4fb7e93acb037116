//! `docs/internals/places.md` says where to add what; this holds it to the files.

use crate::paths;

/// File and text of each row.
fn rows(page: &str) -> Vec<(String, String)> {
    let cells = |line: &str| -> Option<(String, String)> {
        let quoted: Vec<&str> =
            line.split('|').filter_map(|cell| cell.trim().strip_prefix('`')?.strip_suffix('`')).collect();
        let [file, text] = quoted.as_slice() else { return None };
        Some(((*file).to_owned(), (*text).to_owned()))
    };
    page.lines().filter(|line| line.starts_with('|')).filter_map(cells).collect()
}

#[test]
fn every_place_is_where_the_page_says() {
    let repository = paths::repository();
    let page = std::fs::read_to_string(repository.join("docs/internals/places.md")).unwrap();
    let rows = rows(&page);
    // The two lines of its head have no file.
    let lines = page.lines().filter(|line| line.starts_with('|')).count();
    assert_eq!(rows.len() + 2, lines, "a row names no file or no text");
    for (file, text) in rows {
        let found = std::fs::read_to_string(repository.join(&file));
        let found = found.unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(found.contains(&text), "{file} has no {text:?}");
    }
}
