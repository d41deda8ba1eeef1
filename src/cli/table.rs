//! Columns of words, aligned.
//!
//! Thread: the caller's. Locks: none. Must never: print.

/// The lines of a table. The last column is not padded, so that no line ends in blanks.
pub fn lines(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let all = || std::iter::once(&head).chain(rows);
    let widths: Vec<usize> = (0..head.len())
        .map(|column| all().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0))
        .collect();
    all().map(|row| line(row, &widths)).collect()
}

fn line(row: &[String], widths: &[usize]) -> String {
    let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
    cells.join("  ").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_word() {
        let rows = [vec!["long-name".to_owned(), "x".to_owned()], vec!["b".to_owned(), "y".to_owned()]];
        assert_eq!(lines(&["NAME", "STATE"], &rows), ["NAME       STATE", "long-name  x", "b          y"]);
    }
}
