//! How a file on a volume is named where kernel and agent speak of one text: in a path that is hashed, matched and
//! recorded.
//!
//! A file of the root filesystem has its path there, which begins with `/`. A file on a volume has
//! `:NAME:PATH`: the volume's name, and its path as the container has it, that is the mount point and the path
//! below it. No name contains a colon, so the second one ends it, and no text means both.

/// Stands before and behind the name.
pub const MARK: u8 = b':';

/// Name and path of a file on a volume; `None` for the text of any other file.
#[must_use]
pub fn split(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = text.strip_prefix(&[MARK])?;
    let end = rest.iter().position(|byte| *byte == MARK)?;
    Some((&rest[..end], &rest[end + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_colon_ends_the_name() {
        assert_eq!(split(b":data:/srv/a:b"), Some((&b"data"[..], &b"/srv/a:b"[..])));
        assert_eq!(split(b":/etc/hosts:/etc/hosts"), Some((&b"/etc/hosts"[..], &b"/etc/hosts"[..])));
        assert_eq!(split(b"/srv/:a:b"), None);
        assert_eq!(split(b":broken"), None);
        assert_eq!(split(b""), None);
    }
}
