//! `resources/openapi.yaml` and the server, held against each other both ways.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::monitor::{Client, Monitor};
use super::schema::Document;
use crate::api::{ROUTES, Verb};
use crate::control::fake::FakeEngine;

/// An operation of the document that takes a body.
struct Taker<'d> {
    verb: String,
    path: String,
    schema: &'d Value,
}

const VERBS: [&str; 4] = ["get", "put", "patch", "delete"];

/// Each path and method of the document.
fn operations(document: &Document) -> Vec<(String, String, &Value)> {
    let mut operations = Vec::new();
    for (path, methods) in document.0["paths"].as_object().unwrap() {
        for (verb, operation) in methods.as_object().unwrap() {
            if verb != "parameters" {
                assert!(VERBS.contains(&verb.as_str()), "{verb} {path}");
                operations.push((verb.to_ascii_uppercase(), path.clone(), operation));
            }
        }
    }
    operations
}

fn takers(document: &Document) -> Vec<Taker<'_>> {
    let mut takers = Vec::new();
    for (verb, path, operation) in operations(document) {
        if let Some(body) = operation.get("requestBody") {
            let schema = document.resolve(&document.resolve(body)["content"]["application/json"]["schema"]);
            let path = path.replace("{drive_id}", "rootfs").replace("{iface_id}", "eth0");
            takers.push(Taker { verb, path, schema });
        }
    }
    takers
}

#[test]
fn the_document_and_the_servers_table_have_the_same_paths_and_methods() {
    let document = Document::read();
    let documented: BTreeSet<(String, String)> = operations(&document)
        .into_iter()
        .map(|(verb, path, _)| (verb, path))
        .collect();
    let served: BTreeSet<(String, String)> = ROUTES
        .iter()
        .map(|route| (route.verb.to_string(), route.path.to_owned()))
        .collect();
    assert_eq!(documented, served);
}

#[test]
fn a_body_is_documented_where_the_method_needs_one() {
    let document = Document::read();
    let takers = takers(&document).len();
    assert_eq!(
        takers,
        ROUTES
            .iter()
            .filter(|route| matches!(route.verb, Verb::Put | Verb::Patch))
            .count()
    );
}

#[test]
fn every_documented_example_is_understood() {
    let document = Document::read();
    for taker in takers(&document) {
        let monitor = Monitor::start(FakeEngine::default());
        for example in taker.examples() {
            document.check(taker.schema, example).unwrap();
            assert_eq!(
                taker.verdict(&document, &mut monitor.connect(), example),
                Ok(()),
                "{} {example}",
                taker.path
            );
        }
    }
}

#[test]
fn the_server_knows_exactly_the_documented_fields() {
    let document = Document::read();
    let monitor = Monitor::start(FakeEngine::default());
    for taker in takers(&document) {
        let (status, answer) = monitor.ask(&taker.verb, &taker.path, &json!({"no_such_field": 1}));
        assert_eq!(status, 400);
        // «unknown field `no_such_field`, expected one of `a`, `b` at line 1 column 2»
        let text = answer["fault_message"].as_str().unwrap();
        assert!(
            text.contains("unknown field `no_such_field`"),
            "{}: {text}",
            taker.path
        );
        let known: BTreeSet<&str> = text.split('`').skip(3).step_by(2).collect();
        let documented: BTreeSet<&str> = taker.schema["properties"]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(known, documented, "{}", taker.path);
    }
}

#[test]
fn what_the_document_allows_is_understood_and_what_it_forbids_is_refused() {
    let document = Document::read();
    let mut tried = 0;
    for taker in takers(&document) {
        for example in taker.examples() {
            for body in variations(&document, taker.schema, example) {
                if taker.contradicts_path(&body) {
                    continue;
                }
                // A new one each time: what is understood may depend on what was configured before.
                let monitor = Monitor::start(FakeEngine::default());
                let documented = document.check(taker.schema, &body);
                let served = taker.verdict(&document, &mut monitor.connect(), &body);
                assert_eq!(
                    documented.is_ok(),
                    served.is_ok(),
                    "{} {} {body}\n document: {documented:?}\n server: {served:?}",
                    taker.verb,
                    taker.path
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 1000, "only {tried} variations were tried");
}

#[test]
fn answers_are_what_the_document_says() {
    let document = Document::read();
    let monitor = Monitor::start(FakeEngine::default());
    let check_all = |monitor: &Monitor| {
        for (verb, path, operation) in operations(&document) {
            if verb == "GET" {
                let (status, answer) = monitor.ask("GET", &path, &Value::Null);
                assert_eq!(status, 200);
                let schema = &operation["responses"]["200"]["content"]["application/json"]["schema"];
                document
                    .check(schema, &answer)
                    .unwrap_or_else(|broken| panic!("GET {path}: {broken}"));
            }
        }
    };
    check_all(&monitor);
    let drive = json!({"drive_id": "a", "is_root_device": true, "is_read_only": true, "path_on_host": "/proc/self/exe"});
    assert_eq!(monitor.ask("PUT", "/drives/a", &drive).0, 204);
    let interface = json!({"iface_id": "a", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01"});
    assert_eq!(monitor.ask("PUT", "/network-interfaces/a", &interface).0, 204);
    assert_eq!(monitor.ask("PUT", "/entropy", &json!({})).0, 204);
    assert_eq!(monitor.ask("PUT", "/guest-channel", &json!({})).0, 204);
    let monitor = monitor.started();
    check_all(&monitor);
    assert_eq!(
        monitor
            .ask("PUT", "/snapshot/create", &json!({"image_path": "i"}))
            .0,
        204
    );
    check_all(&monitor);
}

impl Taker<'_> {
    fn examples(&self) -> &[Value] {
        let examples = self.schema["examples"].as_array();
        examples.unwrap_or_else(|| panic!("{} has no examples", self.path))
    }

    /// Whether the body names another thing than the path: refused, which no schema can say.
    fn contradicts_path(&self, body: &Value) -> bool {
        ["drive_id", "iface_id"].iter().any(|id| match body.get(id) {
            Some(Value::String(name)) => !self.path.ends_with(name.as_str()),
            _ => false,
        })
    }

    /// Whether the server understands `body`, whatever it thinks of doing it: files that are not there, or a request
    /// that comes too early, are no matter of the document.
    fn verdict(&self, document: &Document, client: &mut Client, body: &Value) -> Result<(), String> {
        let (status, answer) = client.ask(&self.verb, &self.path, body);
        if status == 204 {
            return Ok(());
        }
        assert_eq!(status, 400, "{body}");
        document.check(document.schema("Error"), &answer).unwrap();
        let text = answer["fault_message"].as_str().unwrap();
        let is_understood = [
            "cannot be opened",
            "Failed to open target file",
            "rate_limiter is not supported",
            "before starting the microVM",
            "after starting the microVM",
            "without kernel configuration",
        ];
        if is_understood.iter().any(|part| text.contains(part)) {
            Ok(())
        } else {
            Err(text.to_owned())
        }
    }
}

/// `example` with one thing changed, anywhere in it.
fn variations(document: &Document, schema: &Value, example: &Value) -> Vec<Value> {
    let schema = document.resolve(schema);
    let mut variations = Vec::new();
    if let Value::Object(object) = example {
        let with = |name: &str, value: Value| {
            let mut changed = object.clone();
            changed.insert(name.to_owned(), value);
            Value::Object(changed)
        };
        variations.push(with("no_such_field", json!(1)));
        for (name, property) in schema["properties"].as_object().unwrap() {
            let mut less = object.clone();
            if less.remove(name).is_some() {
                variations.push(Value::Object(less));
            }
            variations.extend(
                candidates(document.resolve(property))
                    .into_iter()
                    .map(|value| with(name, value)),
            );
            if let Some(inner) = object.get(name) {
                variations.extend(
                    variations_within(document, property, inner)
                        .into_iter()
                        .map(|value| with(name, value)),
                );
            }
        }
    }
    variations
}

fn variations_within(document: &Document, schema: &Value, example: &Value) -> Vec<Value> {
    match example {
        Value::Array(items) => {
            let item_schema = &document.resolve(schema)["items"];
            let varied = items.iter().flat_map(|item| {
                if item.is_object() {
                    variations(document, item_schema, item)
                } else {
                    candidates(item_schema)
                }
            });
            varied.map(|item| json!([item])).collect()
        }
        _ => variations(document, schema, example),
    }
}

/// Values of every type, those that `schema` names, and those just outside its bounds.
fn candidates(schema: &Value) -> Vec<Value> {
    let mut candidates = vec![
        Value::Null,
        json!(true),
        json!(1),
        json!(-1),
        json!(1.5),
        json!("/nonexistent/x"),
        json!([]),
        json!({}),
    ];
    candidates.extend(schema["enum"].as_array().cloned().unwrap_or_default());
    for bound in ["minimum", "maximum"] {
        if let Some(bound) = schema[bound].as_i64() {
            candidates.extend([json!(bound - 1), json!(bound), json!(bound + 1)]);
        }
    }
    candidates
}
