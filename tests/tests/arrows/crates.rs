//! The modules of one crate, and which file uses which. Follows `mod` declarations from the root file and
//! resolves paths as far as modules go: the item a path ends in does not matter.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::tokens::{self, Token};

/// How far a name is followed through modules that hand it on.
const MAX_HOPS: usize = 16;

/// A module's path from the crate's root; the root's is empty.
type Name = Vec<String>;

#[derive(Debug)]
struct Module {
    /// Relative to the crate's root file.
    file: String,
    /// What its `use` lines bring in: the name here, and its path.
    imports: BTreeMap<String, Vec<String>>,
    /// The paths that its code names.
    paths: Vec<Vec<String>>,
}

/// All modules of a crate.
#[derive(Debug, Default)]
pub struct Crate {
    modules: BTreeMap<Name, Module>,
}

impl Crate {
    /// Reads a crate from its root file.
    ///
    /// # Panics
    /// When a module's file is missing.
    pub fn read(root: &Path) -> Self {
        let mut found = Self::default();
        let folder = root.parent().unwrap();
        found.add(folder, root, Vec::new(), folder);
        found
    }

    fn add(&mut self, base: &Path, file: &Path, name: Name, children: &Path) {
        let source = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let tokens = tokens::of(&source);
        let (declared, module) = Module::parse(&tokens, relative(base, file));
        self.modules.insert(name.clone(), module);
        for child in declared {
            let flat = children.join(format!("{child}.rs"));
            let folder = children.join(&child);
            let file = if flat.exists() {
                flat
            } else {
                folder.join("mod.rs")
            };
            let name = [name.clone(), vec![child]].concat();
            self.add(base, &file, name, &folder);
        }
    }

    /// Each file and the files it uses.
    pub fn arrows(&self) -> BTreeMap<String, BTreeSet<String>> {
        let of = |(name, module): (&Name, &Module)| {
            let used = module
                .paths
                .iter()
                .filter_map(|path| self.resolve(name, path, 0));
            let files = used.map(|target| self.modules[&target].file.clone());
            let others = files.filter(|file| *file != module.file).collect();
            (module.file.clone(), others)
        };
        self.modules.iter().map(of).collect()
    }

    /// The module in which the item of a path is defined; `None` for other crates' paths.
    fn resolve(&self, from: &Name, path: &[String], hops: usize) -> Option<Name> {
        let (first, mut rest) = path.split_first()?;
        let mut at = match first.as_str() {
            "crate" => Name::new(),
            "self" => from.clone(),
            "super" => parent(from)?,
            _ => {
                rest = path;
                from.clone()
            }
        };
        let mut known = rest.len() < path.len();
        for (i, segment) in rest.iter().enumerate() {
            let child = [at.clone(), vec![segment.clone()]].concat();
            if segment == "super" {
                at = parent(&at)?;
            } else if self.modules.contains_key(&child) {
                at = child;
            } else if let Some(import) = self.modules[&at].imports.get(segment)
                && hops < MAX_HOPS
            {
                let onward = [import.clone(), rest[i + 1..].to_vec()].concat();
                return self.resolve(&at, &onward, hops + 1);
            } else {
                break;
            }
            known = true;
        }
        known.then_some(at)
    }
}

fn parent(name: &Name) -> Option<Name> {
    name.split_last().map(|(_, parent)| parent.to_vec())
}

fn relative(base: &Path, file: &Path) -> String {
    let inside: PathBuf = file.strip_prefix(base).unwrap().into();
    inside.display().to_string()
}

impl Module {
    /// The names of the modules declared in a file, and the file as a module.
    fn parse(tokens: &[Token], file: String) -> (Vec<String>, Self) {
        let mut declared = Vec::new();
        let mut module = Self {
            file,
            imports: BTreeMap::new(),
            paths: Vec::new(),
        };
        let mut words = BTreeSet::new();
        let mut named: Vec<Vec<String>> = Vec::new();
        let mut i = 0;
        while i < tokens.len() {
            match &tokens[i..] {
                [Token::Word(key), Token::Word(name), Token::Mark(';'), ..] if key == "mod" => {
                    declared.push(name.clone());
                    i += 3;
                }
                [Token::Word(key), ..] if key == "use" => {
                    i += 1;
                    tree(tokens, &mut i, &[], &mut module.imports);
                }
                [Token::Word(first), Token::Path, ..] => {
                    let mut path = vec![first.clone()];
                    i += 1;
                    while let [Token::Path, Token::Word(next), ..] = &tokens[i..] {
                        path.push(next.clone());
                        i += 2;
                    }
                    words.insert(first.clone());
                    named.push(path);
                    // A turbofish, or a path's type arguments.
                    if tokens.get(i) == Some(&Token::Path) {
                        i += 1;
                    }
                }
                [Token::Word(word), ..] => {
                    words.insert(word.clone());
                    i += 1;
                }
                _ => i += 1,
            }
        }
        // A name that is brought in and never said here is only handed on. A trait may be used without
        // its name: it is brought in `as _`.
        let used = module.imports.iter().filter(|(name, _)| {
            words.contains(*name) || name.starts_with('_') || name.starts_with('*')
        });
        let used: Vec<_> = used.map(|(_, path)| path.clone()).collect();
        module.paths = named.into_iter().chain(used).collect();
        (declared, module)
    }
}

/// One `use` tree from `i` on: each name it brings in, and that name's path.
fn tree(
    tokens: &[Token],
    i: &mut usize,
    prefix: &[String],
    imports: &mut BTreeMap<String, Vec<String>>,
) {
    let mut path = prefix.to_vec();
    loop {
        match tokens.get(*i) {
            Some(Token::Word(word)) if word == "as" => {
                if let Some(Token::Word(alias)) = tokens.get(*i + 1) {
                    let unnamed = format!("_{}", imports.len());
                    let name = if alias == "_" { unnamed } else { alias.clone() };
                    imports.insert(name, path.clone());
                }
                *i += 2;
                return;
            }
            Some(Token::Word(word)) => {
                path.push(word.clone());
                *i += 1;
            }
            Some(Token::Path) => *i += 1,
            Some(Token::Mark('*')) => {
                imports.insert(format!("*{}", imports.len()), path);
                *i += 1;
                return;
            }
            Some(Token::Mark('{')) => {
                *i += 1;
                while tokens.get(*i).is_some_and(|t| *t != Token::Mark('}')) {
                    tree(tokens, i, &path, imports);
                    if tokens.get(*i) == Some(&Token::Mark(',')) {
                        *i += 1;
                    }
                }
                *i += 1;
                return;
            }
            _ => {
                if path.last().is_some_and(|last| last == "self") {
                    path.pop();
                }
                if let Some(last) = path.last() {
                    imports.insert(last.clone(), path.clone());
                }
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(sources: &[(&str, &str)]) -> BTreeMap<String, BTreeSet<String>> {
        let folder = tempfile::tempdir().unwrap();
        for (name, source) in sources {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, source).unwrap();
        }
        Crate::read(&folder.path().join("lib.rs")).arrows()
    }

    fn arrows(found: &BTreeMap<String, BTreeSet<String>>) -> Vec<String> {
        let of = |(from, to): (&String, &BTreeSet<String>)| {
            to.iter()
                .map(|to| format!("{from} {to}"))
                .collect::<Vec<_>>()
        };
        found.iter().flat_map(of).collect()
    }

    #[test]
    fn paths_lead_to_the_file_in_which_they_end() {
        let found = files(&[
            ("lib.rs", "mod a; mod b;"),
            (
                "a.rs",
                "use crate::b::{c::{self, One}, Two}; fn f(x: One) -> Two { c::g(x) }",
            ),
            ("b/mod.rs", "pub mod c; pub struct Two;"),
            (
                "b/c.rs",
                "use super::Two; pub fn g(x: One) -> Two { Two } fn h() { crate::a::f() }",
            ),
        ]);
        assert_eq!(
            arrows(&found),
            [
                "a.rs b/c.rs",
                "a.rs b/mod.rs",
                "b/c.rs a.rs",
                "b/c.rs b/mod.rs"
            ]
        );
    }

    #[test]
    fn a_name_that_is_handed_on_leads_to_where_it_is_from() {
        let found = files(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "fn f(x: crate::b::One) {}"),
            ("b/mod.rs", "mod c; mod d; pub use c::One;"),
            ("b/c.rs", "pub struct One;"),
            ("b/d.rs", "use super::One; fn g(x: One) {}"),
        ]);
        assert_eq!(arrows(&found), ["a.rs b/c.rs", "b/d.rs b/c.rs"]);
    }

    #[test]
    fn a_trait_brought_in_without_a_name_is_used() {
        let found = files(&[
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::Read as _;"),
            ("b.rs", "pub trait Read {}"),
        ]);
        assert_eq!(arrows(&found), ["a.rs b.rs"]);
    }
}
