//! Bounds what a chat template builds, so that nothing it does with a value runs on without end or past the stack.
//!
//! The engine's fuel pays for instructions and for what they make, but not for what lies within a value: sixty lists of the list
//! before, twice, cost a few hundred instructions, and turning the last one into a string takes 2⁶⁰ steps. So each instruction that
//! makes a value is followed by a test of it, and one that may compare is preceded by a test of its last operand, which pays for what
//! the test visits. A namespace may hold no other and may not lie within another value: what was tested cannot grow
//! afterwards, nor hold itself.
//!
//! The instructions are minijinja's own (`unstable_machinery`), which is why its minor version is pinned: an instruction that is new
//! there may have to be listed in [`around`].

use std::sync::LazyLock;

use minijinja::machinery::ast::{BinOpKind, CallArg, Expr, Stmt};
use minijinja::machinery::{Instruction, Instructions};
use minijinja::value::{ObjectRepr, Value, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State};

/// Lists and maps within each other, values in all and bytes of text that a value may have; bytes of a string.
const DEEPEST: usize = 100;
const MOST: usize = 50_000;
pub(super) const TEXT: usize = 16 << 20;
const STRING: usize = 4 << 20;
const LONGEST_NUMBER: usize = 40;

/// Operators within each other in an expression.
const NESTED: usize = 1000;

/// What is visited for one unit of fuel, which is what an instruction costs: values, bytes of text within them, which are only compared,
/// and bytes of a string, which tests look at one by one.
const VALUES_FOR_FUEL: usize = 16;
const TEXT_FOR_FUEL: usize = 4096;
const STRING_FOR_FUEL: usize = 256;

const BOUNDED: &str = "bounded";
const ASSIGNABLE: &str = "assignable";

/// Installs the tests that [`guarded`] instructions call.
pub(super) fn install(environment: &mut Environment) {
    environment.add_test(BOUNDED, |state: &mut State, value: ValueOrKwargs| -> Result<bool, Error> {
        bounded(state, &value.into_value()).map(|()| true)
    });
    environment.add_test(ASSIGNABLE, |state: &mut State, value: Value, target: Value| -> Result<bool, Error> {
        let mut weight = Weight::default();
        weight.add(&value, 1)?;
        // Anything but a namespace is refused by the assignment itself.
        weight.add(&target, 0)?;
        weight.pay(state).map(|()| true)
    });
    // It prints every variable at once.
    environment.remove_global("debug");
}

/// Refuses a value that is too deep or too large.
pub(super) fn bounded(state: &State, value: &Value) -> Result<(), Error> {
    if let Some(text) = value.as_str() {
        if text.len() > STRING {
            return Err(problem(format!("a string has over {STRING} bytes, which chat templates may not build")));
        }
        return state.consume_fuel((text.len() / STRING_FOR_FUEL) as u64);
    }
    if value.as_object().is_none() {
        return Ok(());
    }
    let mut weight = Weight::default();
    weight.add(value, 0)?;
    weight.pay(state)
}

/// Refuses `'{:>1000000000}'.format(1)`, whose text takes no fuel before it is there: no more than the widths and, for each field, the
/// largest argument.
pub(super) fn formattable(format: &str, arguments: &[Value]) -> Result<(), Error> {
    let widths = format.split(|char: char| !char.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = widths.map(|digits| digits.parse().unwrap_or(STRING)).fold(0, usize::saturating_add);
    let mut largest = 0;
    for argument in arguments {
        let mut weight = Weight::default();
        weight.add(argument, 0)?;
        largest = largest.max(weight.text + LONGEST_NUMBER * weight.parts);
    }
    if widths.saturating_add(format.matches('{').count() * largest) > STRING {
        return Err(problem(format!("format() may write over {STRING} bytes, which chat templates may not do")));
    }
    Ok(())
}

/// What lies within a value, itself included.
#[derive(Default)]
struct Weight {
    parts: usize,
    text: usize,
}

impl Weight {
    fn add(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.parts += 1;
        self.text += value.as_str().map_or(0, str::len);
        if depth > DEEPEST || self.parts > MOST || self.text > TEXT {
            return Err(problem(format!(
                "a value is over {DEEPEST} deep, or has over {MOST} parts or {TEXT} bytes, which chat templates may not build"
            )));
        }
        let Some(object) = value.as_object() else { return Ok(()) };
        if depth > 0 && Some(object.type_name()) == *NAMESPACE {
            return Err(problem("a namespace is put into another value, which chat templates may not do".to_string()));
        }
        if object.repr() == ObjectRepr::Map {
            object.try_iter_pairs().into_iter().flatten().try_for_each(|(key, value)| {
                self.add(&key, depth + 1)?;
                self.add(&value, depth + 1)
            })
        } else {
            object.try_iter().into_iter().flatten().try_for_each(|part| self.add(&part, depth + 1))
        }
    }

    fn pay(&self, state: &State) -> Result<(), Error> {
        state.consume_fuel((self.parts / VALUES_FOR_FUEL + self.text / TEXT_FOR_FUEL) as u64)
    }
}

/// What minijinja calls a namespace's type, which is private.
static NAMESPACE: LazyLock<Option<&str>> = LazyLock::new(|| {
    let one = minijinja::functions::namespace(None).ok()?;
    one.as_object().map(|object| object.type_name())
});

fn problem(problem: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem)
}

/// The same instructions with tests between them.
pub(super) fn guarded<'source>(plain: &Instructions<'source>) -> Instructions<'source> {
    let all = || (0u32..).map_while(|index| plain.get(index).map(|instruction| (index, instruction)));
    // Where each instruction, with what precedes it, lands.
    let (mut starts, mut end) = (Vec::new(), 0u32);
    for (index, instruction) in all() {
        starts.push(end);
        let (before, after) = around(instruction, plain.get(index + 1));
        end += (before.len() + 1 + after.len()) as u32;
    }
    starts.push(end);
    let mut guarded = Instructions::new(plain.name(), plain.source());
    for (index, instruction) in all() {
        let (before, after) = around(instruction, plain.get(index + 1));
        let mut moved = instruction.clone();
        if let Some(target) = target(&mut moved) {
            *target = starts.get(*target as usize).copied().unwrap_or(end);
        }
        for instruction in before.into_iter().chain([moved]).chain(after) {
            match (plain.get_span(index), plain.get_line(index)) {
                (Some(span), _) => guarded.add_with_span(instruction, span),
                (None, Some(line)) => guarded.add_with_line(instruction, line as u16),
                (None, None) => guarded.add(instruction),
            };
        }
    }
    guarded
}

/// What is put before and after an instruction.
fn around<'source>(
    instruction: &Instruction<'source>,
    next: Option<&Instruction<'source>>,
) -> (Vec<Instruction<'source>>, Vec<Instruction<'source>>) {
    use Instruction::*;
    // Leaves the stack as it was.
    let test = || vec![DupTop, PerformTest(BOUNDED, Some(1), !0), DiscardTop];
    // What is called with one operand does not compare it; it may be the whole conversation, of which the length is asked.
    let unless_alone = |arguments: &Option<u16>| if *arguments == Some(1) { vec![] } else { test() };
    match instruction {
        BuildMap(_) | BuildList(_) | BuildTuple(_) | Add | Mul | StringConcat | CallFunction(..) | CallObject(_) => {
            (vec![], test())
        }
        ApplyFilter(_, arguments, _) | CallMethod(_, arguments) => (unless_alone(arguments), test()),
        PerformTest("lower" | "upper", ..) => (test(), vec![]),
        PerformTest(_, arguments, _) => (unless_alone(arguments), vec![]),
        // What a comparison visits is at most what either side has.
        Eq | Ne | Gt | Gte | Lt | Lte | In | CompareAndPreserve(_) | GetItem => (test(), vec![]),
        // The target of an assignment; the value lies on the stack.
        Lookup(name) if matches!(next, Some(SetAttr(_))) => {
            (vec![DupTop, Lookup(name), PerformTest(ASSIGNABLE, Some(2), !0), DiscardTop], vec![])
        }
        _ => (vec![], vec![]),
    }
}

/// Where an instruction jumps to.
fn target<'a>(instruction: &'a mut Instruction) -> Option<&'a mut u32> {
    use Instruction::*;
    match instruction {
        Iterate(target)
        | Jump(target)
        | JumpIfFalse(target)
        | JumpIfFalseOrPop(target)
        | JumpIfTrueOrPop(target)
        | BuildMacro(_, target, _) => Some(target),
        _ => None,
    }
}

/// Refuses what would keep the engine at compiling, which takes no fuel: `[0] * 100000000`, since it computes with constants, and long
/// chains of operators, since it looks for constants anew in each part of one.
pub(super) fn compilable(statement: &Stmt) -> Result<(), Error> {
    match statement {
        Stmt::Template(template) => block(&template.children),
        Stmt::EmitExpr(emit) => expression(&emit.expr, 0),
        Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
        Stmt::ForLoop(each) => {
            expressions([&each.iter].into_iter().chain(&each.filter_expr), 0)?;
            block(each.body.iter().chain(&each.else_body))
        }
        Stmt::IfCond(cond) => {
            expression(&cond.expr, 0)?;
            block(cond.true_body.iter().chain(&cond.false_body))
        }
        Stmt::WithBlock(with) => {
            expressions(with.assignments.iter().map(|(_, value)| value), 0)?;
            block(&with.body)
        }
        Stmt::Set(set) => expression(&set.expr, 0),
        Stmt::SetBlock(set) => {
            expressions(&set.filter, 0)?;
            block(&set.body)
        }
        Stmt::AutoEscape(escape) => {
            expression(&escape.enabled, 0)?;
            block(&escape.body)
        }
        Stmt::FilterBlock(filter) => {
            expression(&filter.filter, 0)?;
            block(&filter.body)
        }
        Stmt::Macro(each) => {
            expressions(&each.defaults, 0)?;
            block(&each.body)
        }
        Stmt::CallBlock(call) => {
            expression(&call.call.expr, 0)?;
            arguments(&call.call.args, 0)?;
            expressions(&call.macro_decl.defaults, 0)?;
            block(&call.macro_decl.body)
        }
        Stmt::Do(call) => {
            expression(&call.call.expr, 0)?;
            arguments(&call.call.args, 0)
        }
    }
}

fn block<'a>(statements: impl IntoIterator<Item = &'a Stmt<'a>>) -> Result<(), Error> {
    statements.into_iter().try_for_each(compilable)
}

fn expressions<'a>(all: impl IntoIterator<Item = &'a Expr<'a>>, depth: usize) -> Result<(), Error> {
    all.into_iter().try_for_each(|each| expression(each, depth))
}

fn arguments(all: &[CallArg], depth: usize) -> Result<(), Error> {
    all.iter().try_for_each(|argument| match argument {
        CallArg::Pos(value) | CallArg::Kwarg(_, value) | CallArg::PosSplat(value) | CallArg::KwargSplat(value) => {
            expression(value, depth)
        }
    })
}

fn expression(each: &Expr, depth: usize) -> Result<(), Error> {
    if depth > NESTED {
        let line = each.span().start_line;
        return Err(problem(format!("an expression has over {NESTED} operators within each other, in line {line}")));
    }
    let depth = depth + 1;
    match each {
        Expr::Var(_) | Expr::Const(_) => Ok(()),
        Expr::Slice(slice) => {
            expression(&slice.expr, depth)?;
            expressions(slice.start.iter().chain(&slice.stop).chain(&slice.step), depth)
        }
        Expr::UnaryOp(unary) => expression(&unary.expr, depth),
        Expr::BinOp(binary) => {
            expressions([&binary.left, &binary.right], depth)?;
            let list = |side: &Expr| side.as_const().is_some_and(|value| value.as_object().is_some());
            if matches!(binary.op, BinOpKind::Mul) && (list(&binary.left) || list(&binary.right)) {
                let line = binary.span().start_line;
                return Err(problem(format!("a list of constants is multiplied, in line {line}; write the list out")));
            }
            Ok(())
        }
        Expr::Compare(compare) => {
            expression(&compare.expr, depth)?;
            expressions(compare.ops.iter().map(|op| &op.expr), depth)
        }
        Expr::IfExpr(cond) => {
            expressions([&cond.test_expr, &cond.true_expr].into_iter().chain(&cond.false_expr), depth)
        }
        Expr::Filter(filter) => {
            expressions(&filter.expr, depth)?;
            arguments(&filter.args, depth)
        }
        Expr::Test(test) => {
            expression(&test.expr, depth)?;
            arguments(&test.args, depth)
        }
        Expr::GetAttr(get) => expression(&get.expr, depth),
        Expr::GetItem(get) => expressions([&get.expr, &get.subscript_expr], depth),
        Expr::Call(call) => {
            expression(&call.expr, depth)?;
            arguments(&call.args, depth)
        }
        Expr::List(list) => expressions(&list.items, depth),
        Expr::Tuple(tuple) => expressions(&tuple.items, depth),
        Expr::Map(map) => expressions(map.keys.iter().chain(&map.values), depth),
    }
}
