//! Reads the values of attributes: numbers, sizes, times and lists, as JSON has them or as text, in which command lines
//! and TOML send them. What is not such a value is nothing; the caller says what is wrong.
//!
//! Pure, as all of the compiler.

use serde_json::{Map, Value};

use super::bytes;
use crate::fault::kind::{Amount, Kept};

pub(super) fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

pub(super) fn real(value: &Value) -> Option<f64> {
    let number = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    number.filter(|number| number.is_finite())
}

pub(super) fn id(value: &Value) -> Option<u32> {
    whole(value)?.try_into().ok()
}

/// More than nothing, less than all.
pub(super) fn part(value: &Value) -> Option<f64> {
    let percent = value.as_str().and_then(|text| text.trim().strip_suffix('%')).map(|text| text.trim().parse::<f64>());
    let fraction = match percent {
        Some(percent) => percent.ok().map(|percent| percent / 100.0),
        None => real(value),
    };
    fraction.filter(|fraction| *fraction > 0.0 && *fraction < 1.0)
}

pub(super) fn byte(value: &Value) -> Option<u8> {
    match value.as_str().and_then(|text| text.trim().strip_prefix("0x")) {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => whole(value)?.try_into().ok(),
    }
}

/// `+4KiB`, `-8192`, `100`.
pub(super) fn signed(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => match text.trim().strip_prefix('-') {
            Some(rest) => i64::try_from(bytes(rest)?).ok().map(|number| -number),
            None => i64::try_from(bytes(text.trim().trim_start_matches('+'))?).ok(),
        },
        _ => None,
    }
}

/// With a sign it is a difference.
pub(super) fn size_amount(value: &Value) -> Option<Amount> {
    let differs = match value {
        Value::String(text) => text.trim().starts_with(['+', '-']),
        _ => false,
    };
    let number = i128::from(signed(value)?);
    match differs {
        true => Some(Amount::MoreBy(number)),
        false => Some(Amount::Is(number)).filter(|_| number >= 0),
    }
}

pub(super) fn time_amount(value: &Value) -> Option<Amount> {
    let Value::String(text) = value else {
        return value.as_i64().map(|seconds| Amount::Is(i128::from(seconds) * 1_000_000_000));
    };
    let text = text.trim();
    if let Some(later) = text.strip_prefix('+') {
        return humantime::parse_duration(later).ok().map(|span| Amount::MoreBy(span.as_nanos() as i128));
    }
    if let Some(earlier) = text.strip_prefix('-') {
        return humantime::parse_duration(earlier).ok().map(|span| Amount::MoreBy(-(span.as_nanos() as i128)));
    }
    if let Ok(seconds) = text.parse::<i64>() {
        return Some(Amount::Is(i128::from(seconds) * 1_000_000_000));
    }
    let moment = humantime::parse_rfc3339_weak(text).ok()?;
    let since = moment.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(Amount::Is(since.as_nanos() as i128))
}

pub(super) fn perm(value: &Value) -> Option<u16> {
    // A number in JSON would be read as decimal by one and as octal by the other.
    u16::from_str_radix(value.as_str()?.trim().trim_start_matches("0o"), 8).ok().filter(|mode| *mode <= 0o7777)
}

/// `["a..b", …]`, or `a..b,c..d` as text.
pub(super) fn texts(value: &Value) -> Option<Vec<String>> {
    let texts: Option<Vec<String>> = match value {
        Value::Array(items) => items.iter().map(|item| item.as_str().map(str::to_string)).collect(),
        Value::String(text) => Some(text.split(',').map(|part| part.trim().to_string()).collect()),
        _ => None,
    };
    texts.filter(|texts| !texts.is_empty())
}

pub(super) fn weight_of(item: &Value) -> (Value, Option<f64>) {
    match item {
        Value::String(_) => (item.clone(), Some(1.0)),
        Value::Object(fields) if fields.keys().all(|name| ["errno", "weight"].contains(&name.as_str())) => {
            let weight = fields.get("weight").map_or(Some(1.0), real);
            (fields.get("errno").cloned().unwrap_or_default(), weight)
        }
        _ => (Value::Null, None),
    }
}

pub(super) fn weight_of_text(text: &str) -> (Value, Option<f64>) {
    match text.split_once('=') {
        None => (text.trim().into(), Some(1.0)),
        Some((errno, weight)) => (errno.trim().into(), weight.trim().parse().ok()),
    }
}

/// The forms of `keep`.
pub(super) fn kept(value: &Value) -> Option<Kept> {
    match value {
        Value::Object(fields) => kept_fields(fields),
        Value::String(text) => {
            let text = text.trim();
            if let Some((persist, of)) = text.split_once('/') {
                let persist = persist.split(',').map(|part| part.trim().parse().ok()).collect::<Option<Vec<u64>>>()?;
                return parts(of.trim().parse().ok()?, persist);
            }
            if let Some(count) = text.strip_suffix("sectors").or_else(|| text.strip_suffix("sector")) {
                return count.trim().parse().ok().map(Kept::Sectors);
            }
            if text.ends_with('%') {
                return part(value).map(Kept::Fraction);
            }
            bytes(text).map(Kept::Bytes)
        }
        value => whole(value).map(Kept::Bytes),
    }
}

fn kept_fields(fields: &Map<String, Value>) -> Option<Kept> {
    let only = |names: &[&str]| fields.keys().all(|name| names.contains(&name.as_str()));
    if let Some(count) = fields.get("bytes").filter(|_| only(&["bytes"])) {
        return count.as_str().map_or_else(|| whole(count), bytes).map(Kept::Bytes);
    }
    if let Some(count) = fields.get("sectors").filter(|_| only(&["sectors"])) {
        return whole(count).map(Kept::Sectors);
    }
    let (of, persist) = (fields.get("parts")?, fields.get("persist")?);
    let persist = persist.as_array()?.iter().map(whole).collect::<Option<Vec<u64>>>()?;
    only(&["parts", "persist"]).then(|| parts(whole(of)?, persist)).flatten()
}

fn parts(of: u64, persist: Vec<u64>) -> Option<Kept> {
    let good = of > 0 && !persist.is_empty() && persist.iter().all(|part| (1..=of).contains(part));
    good.then_some(Kept::Parts { of, persist })
}
