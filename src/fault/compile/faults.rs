//! Compiles `fault`: which terms it has, and to which operations each can happen.
//!
//! Pure, as all of the compiler.

use super::kinds::{Reader, pointer};
use super::{Check, Problem, escaped};
use crate::fault::errno;
use crate::fault::kind::{Errors, Fault, KINDS, Kind, Then};
use crate::fault::op::{DIRECT, Op, OpSet, RANGED};
use crate::fault::plan::Term;
use crate::fault::spec::{FaultSpec, MatchSpec};
use crate::fault::term;

impl Check {
    /// The terms of a rule: one for a kind, as many as there are for terms.
    pub(super) fn terms(&mut self, fault: &FaultSpec, place: &MatchSpec) -> Vec<Term> {
        self.known_ops(&place.ops);
        let parsed = match fault {
            FaultSpec::Kind { .. } => vec![term::Term { chance: 1.0, limit: None, fault: Some(fault.clone()) }],
            FaultSpec::Terms(text) => match term::parse(text) {
                Ok(terms) => terms,
                Err(problem) => {
                    self.found(problem);
                    return Vec::new();
                }
            },
        };
        let mut compiled = Vec::new();
        let whole: Vec<&FaultSpec> = parsed.iter().filter_map(|term| term.fault.as_ref()).collect();
        if whole.is_empty() {
            self.found(Problem::new("#/fault", "fault: terms that do nothing"));
        }
        for term in &parsed {
            let (ops, fault) = match &term.fault {
                // What "off" lets pass is what the others would act on.
                None => (OpSet::all(), None),
                Some(spec) => {
                    let Some((fault, kind, able)) = self.fault(spec) else { continue };
                    (self.ops(place, kind, able, &fault), Some(fault))
                }
            };
            compiled.push(Term { chance: term.chance, limit: term.limit, ops, fault });
        }
        let acting = compiled.iter().filter(|term| term.fault.is_some()).map(|term| term.ops);
        let acting = acting.fold(OpSet::default(), OpSet::with);
        compiled.iter_mut().filter(|term| term.fault.is_none()).for_each(|term| term.ops = acting);
        compiled
    }

    /// Conditions that no request of these operations can meet.
    pub(super) fn can_be_met(&mut self, spec: &MatchSpec, ops: OpSet) {
        let conditions = [
            ("offset", spec.offset.is_some(), RANGED),
            ("length", spec.length.is_some(), RANGED),
            ("direct", spec.direct.is_some(), DIRECT),
        ];
        for (name, _, able) in conditions.into_iter().filter(|(_, is, able)| *is && ops.within(*able).is_empty()) {
            let detail = format!("match.{name}: no request of {} can meet it", ops.names().join(" "));
            let hint = format!("those of {} can", able.names().join(" "));
            self.found(Problem::new(format!("#/match/{name}"), detail).hint(hint));
        }
    }

    fn known_ops(&mut self, ops: &[String]) {
        for (i, word) in ops.iter().enumerate().filter(|(_, word)| OpSet::parse(word).is_none()) {
            if let Some(reason) = Op::why_never(word) {
                let detail = format!("match.ops[{i}]: {word:?} never arrives: {reason}");
                self.found(Problem::new(format!("#/match/ops/{i}"), detail));
                continue;
            }
            let detail = format!("match.ops[{i}]: unknown operation {word:?}");
            let known = OpSet::words().collect::<Vec<_>>();
            self.found(Problem::new(format!("#/match/ops/{i}"), detail).nearest(word, known.into_iter()));
        }
    }

    /// The operations that are named, as far as the kind can act on them. An operation that is named by itself and cannot be
    /// acted on is wrong; a group stands for those of its operations that can, and that can meet the conditions on bytes.
    fn ops(&mut self, spec: &MatchSpec, kind: &Kind, able: OpSet, fault: &Fault) -> OpSet {
        let ops = &spec.ops;
        if ops.is_empty() {
            let usual = kind.usual.within(able);
            return narrowed(if usual.is_empty() { able } else { usual }, spec);
        }
        let mut set = OpSet::default();
        for (i, word) in ops.iter().enumerate() {
            let Some(named) = OpSet::parse(word) else { continue };
            let part = match fault {
                // A setattr is lost as far as it changes the size.
                Fault::Drop => named.droppable(),
                _ => named.within(able),
            };
            if !Op::ALL.iter().any(|op| part.may_concern(*op) && able.may_concern(*op)) {
                self.found(unable(i, word, able, fault));
            }
            set = set.with(if OpSet::single(word).is_none() { narrowed(part, spec) } else { part });
        }
        set
    }

    /// The fault, its kind, and the operations that it can act on.
    fn fault(&mut self, spec: &FaultSpec) -> Option<(Fault, &'static Kind, OpSet)> {
        let FaultSpec::Kind { kind: word, attributes } = spec else { return None };
        let Some(kind) = Kind::find(word) else {
            let detail = format!("fault.kind: unknown kind {word:?}");
            let known = KINDS.iter().filter(|kind| kind.built).map(|kind| kind.word);
            self.found(Problem::new("#/fault/kind", detail).nearest(word, known));
            return None;
        };
        for name in attributes.keys().filter(|name| !kind.attributes.contains(&name.as_str())) {
            let detail = format!("fault.{name}: the kind {word:?} has no such attribute");
            let known = kind.attributes.iter().copied().chain(["kind"]);
            self.found(Problem::new(pointer(&escaped(name)), detail).nearest(name, known));
        }
        if !kind.built {
            let detail = format!("fault.kind: {word:?} is not built yet");
            self.found(Problem { not_yet: true, ..Problem::new("#/fault/kind", detail) });
            return None;
        }
        let mut read = Reader { check: self, kind, attributes };
        let fault = read.fault()?;
        let able = read.able(&fault);
        Some((fault, kind, able))
    }
}

/// Of operations that were not named one by one, those that a condition on bytes is about; all, if it is about none.
fn narrowed(ops: OpSet, spec: &MatchSpec) -> OpSet {
    let conditions = [(spec.offset.is_some() || spec.length.is_some(), RANGED), (spec.direct.is_some(), DIRECT)];
    conditions.into_iter().filter(|(is, _)| *is).fold(ops, |ops, (_, about)| match ops.within(about) {
        none if none.is_empty() => ops,
        some => some,
    })
}

fn unable(i: usize, word: &str, able: OpSet, fault: &Fault) -> Problem {
    let pointer = format!("#/match/ops/{i}");
    let errors = match fault {
        Fault::Error { errors, .. } => Some(errors.clone()),
        Fault::Stall { then: Then::Error(errno), .. } => Some(Errors::One(*errno)),
        _ => None,
    };
    let problem = match (fault, errors) {
        (_, Some(errors)) => {
            let errno = match errors {
                Errors::One(errno) => errno::name(errno).map_or_else(|| errno.to_string(), str::to_string),
                _ => "one of these errors".into(),
            };
            let detail = format!("match.ops[{i}]: no storage makes {word:?} fail with {errno}");
            let hint = "the manual page of the operation lists what it can give; with \"force\": true it is given all the same";
            return Problem::new(pointer, detail).hint(hint);
        }
        (Fault::Drop, _) => Problem::new(pointer, format!("match.ops[{i}]: {word:?} cannot be dropped")),
        (other, _) => {
            Problem::new(pointer, format!("match.ops[{i}]: the kind {:?} cannot act on {word:?}", other.word()))
        }
    };
    let mut words: Vec<&str> = Op::ALL.iter().filter(|op| able.has(**op)).map(|op| op.word()).collect();
    if matches!(fault, Fault::Drop) {
        words.push("truncate");
    }
    problem.hint(format!("it acts on {}", words.join(" ")))
}
