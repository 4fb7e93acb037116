//! Recorded text, shown to people: it was chosen by whoever was recorded, and decides neither what a terminal does nor what its
//! reader takes it for.

use std::fmt::{self, Write as _};

/// Stands after arguments of which not all are known.
pub const CUT: &str = "…";

/// Whether a character is not seen where it stands, or changes how others are shown: controls, marks of the direction of writing,
/// line separators, and what Unicode has as `Default_Ignorable_Code_Point` (joiners, fillers, tags, variation selectors, …).
#[must_use]
pub fn is_hidden(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
                | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
                | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}' | '\u{1bca0}'..='\u{1bca3}'
                | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}'
        )
}

/// The text with every [hidden](is_hidden) character as `\u{1b}`; all others as they are.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        push_visible(&mut out, character);
    }
    out
}

/// The same for a text of several lines, which stay lines.
#[must_use]
pub fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

fn push_visible(out: &mut String, character: char) {
    if is_hidden(character) {
        out.extend(character.escape_unicode());
    } else {
        out.push(character);
    }
}

/// An argument or a path as one word among others: in double quotes, with a backslash before `"` and `\`, where it is empty or has
/// blanks, quotes or hidden characters. Different texts are different words.
#[must_use]
pub fn word(text: &str) -> String {
    // U+2800 is a letter of Braille without a dot.
    let needs_quotes = |character: char| {
        character.is_whitespace() || matches!(character, '"' | '\'' | '\u{2800}') || is_hidden(character)
    };
    if !text.is_empty() && text != CUT && !text.contains(needs_quotes) {
        return text.to_owned();
    }
    let mut out = String::from("\"");
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            out.push('\\');
        }
        push_visible(&mut out, character);
    }
    out.push('"');
    out
}

/// Arguments as [words](word), with a blank between two.
#[must_use]
pub fn words<T: AsRef<str>>(arguments: &[T]) -> String {
    arguments.iter().map(|argument| word(argument.as_ref())).collect::<Vec<_>>().join(" ")
}

/// JSON that means the same, with hidden characters inside its strings as `\u001b`.
#[must_use]
pub fn visible_json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for character in json.chars() {
        // A line's end stands between values; inside a string it is escaped already.
        if is_hidden(character) && character != '\n' {
            for unit in character.encode_utf16(&mut [0; 2]) {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(character);
        }
    }
    out
}

/// Writes one field of a log line; `message` without its name.
///
/// # Errors
///
/// Those of `out`.
pub fn log_field(out: &mut impl fmt::Write, name: &str, value: &dyn fmt::Debug) -> fmt::Result {
    let value = printable(&format!("{value:?}"));
    match name {
        "message" => out.write_str(&value),
        // Where a message of the `log` crate comes from, which the line says already.
        _ if name.starts_with("log.") => Ok(()),
        _ => write!(out, "{name}={value}"),
    }
}

/// A YAML scalar in double quotes, whatever the text holds.
pub(crate) fn yaml(text: &str) -> String {
    let mut out = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            hidden if is_hidden(hidden) => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\U{:08x}", u32::from(hidden));
            }
            other => out.push(other),
        }
    }
    out.push('"');
    out
}

/// Whether a recorded text may stand for bytes that are not UTF-8, each recorded as `\xNN`. It may as well be those four characters:
/// the record does not tell.
pub(crate) fn may_have_other_bytes(text: &str) -> bool {
    let digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.as_bytes().windows(4).any(|window| window.starts_with(b"\\x") && window[2..].iter().all(digit))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// What no reader sees, by its ranges in Unicode 17.
    const HIDDEN: &[(u32, u32)] = &[
        (0x00, 0x1f),
        (0x7f, 0x9f),
        (0xad, 0xad),
        (0x034f, 0x034f),
        (0x061c, 0x061c),
        (0x115f, 0x1160),
        (0x17b4, 0x17b5),
        (0x180b, 0x180f),
        (0x200b, 0x200f),
        (0x2028, 0x202e),
        (0x2060, 0x206f),
        (0x3164, 0x3164),
        (0xfe00, 0xfe0f),
        (0xfeff, 0xfeff),
        (0xffa0, 0xffa0),
        (0xfff0, 0xfffb),
        (0x1_bca0, 0x1_bca3),
        (0x1_d173, 0x1_d17a),
        (0xe_0000, 0xe_0fff),
    ];

    #[test]
    fn every_character_is_seen_or_named() {
        for character in '\0'..=char::MAX {
            let code = u32::from(character);
            let hidden = HIDDEN.iter().any(|(first, last)| (*first..=*last).contains(&code));
            let shown = printable(&character.to_string());
            if hidden {
                assert_eq!(shown, format!("\\u{{{code:x}}}"));
            } else {
                assert_eq!(shown, character.to_string(), "{code:x}");
            }
            assert_eq!(printable(&shown), shown);
            assert_eq!(yaml(&character.to_string()).contains(character), !hidden, "{code:x}");
        }
    }

    #[test]
    fn text_of_every_script_stays_as_it_is() {
        for text in
            ["/usr/bin/nginx", "مرحبا", "नमस्ते", "漢字かなカナ", "한국어", "Ünïcödé", "🦀🚀", "ไทย", "שלום"]
        {
            assert_eq!(printable(text), text);
            assert_eq!(word(text), text);
        }
    }

    #[test]
    fn words_show_where_one_ends() {
        assert_eq!(words(&["sh", "-c", "a b", ""]), "sh -c \"a b\" \"\"");
        assert_eq!(words(&["it's", "\"", "a\\b", "…"]), "\"it's\" \"\\\"\" a\\b \"…\"");
        assert_eq!(words(&["\u{1b}[2J", "\\u{1b}[2J"]), "\"\\u{1b}[2J\" \\u{1b}[2J");
        assert_eq!(words(&["a\u{a0}b", "\u{2800}"]), "\"a\u{a0}b\" \"\u{2800}\"");
        assert_ne!(words(&["a b"]), words(&["a", "b"]));
        assert_eq!(printable_lines("a\nb\r\u{1b}\n"), "a\nb\\u{d}\\u{1b}\n");
    }

    #[test]
    fn a_log_line_is_one_line() {
        let field = |name: &str, value: &dyn fmt::Debug| {
            let mut out = String::new();
            log_field(&mut out, name, value).unwrap();
            out
        };
        assert_eq!(
            field("message", &format_args!("a\nERROR b\u{1b}[2J\u{ad}")),
            "a\\u{a}ERROR b\\u{1b}[2J\\u{ad}"
        );
        assert_eq!(field("peer", &"x\ny\u{e0041}"), "peer=\"x\\ny\\u{e0041}\"");
        assert_eq!(field("log.target", &"rustls"), "");
    }

    #[test]
    fn bytes_that_are_not_text_are_told() {
        for text in ["/a\\xff", "\\x00", "\\\\x2db"] {
            assert!(may_have_other_bytes(text), "{text}");
        }
        for text in ["/a\\b", "/a\\xF", "/a\\xgg", "/axff", "\\x1"] {
            assert!(!may_have_other_bytes(text), "{text}");
        }
    }

    /// Reads words back.
    fn read(mut text: &str) -> Vec<String> {
        let mut found = Vec::new();
        while !text.is_empty() {
            let mut word = String::new();
            if let Some(rest) = text.strip_prefix('"') {
                let mut characters = rest.char_indices();
                loop {
                    match characters.next().unwrap() {
                        (end, '"') => {
                            text = &rest[end + 1..];
                            break;
                        }
                        (_, '\\') => match characters.next().unwrap().1 {
                            'u' => {
                                let digits: String = characters
                                    .by_ref()
                                    .skip(1)
                                    .map(|(_, digit)| digit)
                                    .take_while(|digit| *digit != '}')
                                    .collect();
                                word.push(char::from_u32(u32::from_str_radix(&digits, 16).unwrap()).unwrap());
                            }
                            other => word.push(other),
                        },
                        (_, other) => word.push(other),
                    }
                }
            } else {
                let end = text.find(' ').unwrap_or(text.len());
                word.push_str(&text[..end]);
                text = &text[end..];
            }
            found.push(word);
            text = text.strip_prefix(' ').unwrap_or(text);
        }
        found
    }

    proptest! {
        #[test]
        fn words_are_read_back_as_they_were(
            arguments in prop::collection::vec("[a-c \"'\\\\u{}\n\u{ad}\u{1b}…]{0,6}|\\PC{0,8}", 0..5),
        ) {
            prop_assert_eq!(read(&words(&arguments)), arguments);
        }

        #[test]
        fn what_is_printed_has_nothing_hidden(text in prop::collection::vec(any::<char>(), 0..40)) {
            let text: String = text.into_iter().collect();
            for shown in [printable(&text), word(&text), yaml(&text), visible_json(&text.replace('\n', ""))] {
                prop_assert!(!shown.contains(is_hidden), "{:?}", shown);
            }
        }
    }

    #[test]
    fn json_means_the_same() {
        assert_eq!(visible_json("{\n\"a\":\"\u{9b}x\u{e0041}é\"}"), "{\n\"a\":\"\\u009bx\\udb40\\udc41é\"}");
        let all: BTreeSet<char> = ('\0'..=char::MAX).filter(|character| is_hidden(*character)).collect();
        assert_eq!(all.len(), HIDDEN.iter().map(|(first, last)| (last - first + 1) as usize).sum::<usize>());
    }
}
