//! As much of JSON Schema as `resources/openapi.yaml` uses; a word that is not known here fails the test.

use serde_json::{Map, Value};

/// The document.
pub(super) struct Document(pub(super) Value);

/// Words that say nothing about validity.
const REMARKS: [&str; 4] = ["description", "default", "deprecated", "examples"];

impl Document {
    pub(super) fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi.yaml");
        let text = std::fs::read_to_string(path).unwrap();
        Self(serde_saphyr::from_str(&text).unwrap())
    }

    /// Follows references.
    pub(super) fn resolve<'d>(&'d self, mut node: &'d Value) -> &'d Value {
        while let Some(reference) = node.get("$ref") {
            let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
            node = self
                .0
                .pointer(pointer)
                .unwrap_or_else(|| panic!("{pointer} is not in the document"));
        }
        node
    }

    pub(super) fn schema(&self, name: &str) -> &Value {
        &self.0["components"]["schemas"][name]
    }

    /// What `value` breaks of `schema`, if anything.
    pub(super) fn check(&self, schema: &Value, value: &Value) -> Result<(), String> {
        let schema = self.resolve(schema).as_object().unwrap();
        for (word, says) in schema {
            let holds = match word.as_str() {
                "type" => is_of_type(says, value),
                "enum" => says.as_array().unwrap().contains(value),
                "minimum" => value
                    .as_i64()
                    .is_none_or(|number| number >= says.as_i64().unwrap()),
                "maximum" => value
                    .as_u64()
                    .is_none_or(|number| number <= says.as_u64().unwrap()),
                "pattern" => value
                    .as_str()
                    .is_none_or(|text| matches_pattern(says.as_str().unwrap(), text)),
                "minProperties" => value
                    .as_object()
                    .is_none_or(|object| object.len() as u64 >= says.as_u64().unwrap()),
                "maxItems" => value
                    .as_array()
                    .is_none_or(|items| items.len() as u64 <= says.as_u64().unwrap()),
                "required" => {
                    let has = |object: &Map<String, Value>| {
                        says.as_array()
                            .unwrap()
                            .iter()
                            .all(|name| object.contains_key(name.as_str().unwrap()))
                    };
                    value.as_object().is_none_or(has)
                }
                "additionalProperties" => {
                    assert_eq!(says, false);
                    let known = schema["properties"].as_object().unwrap();
                    value
                        .as_object()
                        .is_none_or(|object| object.keys().all(|name| known.contains_key(name)))
                }
                "properties" => {
                    for (name, schema) in says.as_object().unwrap() {
                        if let Some(value) = value.get(name) {
                            self.check(schema, value)
                                .map_err(|broken| format!("{name}: {broken}"))?;
                        }
                    }
                    true
                }
                "items" => {
                    for item in value.as_array().into_iter().flatten() {
                        self.check(says, item)?;
                    }
                    true
                }
                "oneOf" => self.alternatives(says, value) == 1,
                "anyOf" => self.alternatives(says, value) > 0,
                remark if REMARKS.contains(&remark) => true,
                unknown => panic!("{unknown:?} is not known to this test"),
            };
            if !holds {
                return Err(format!("{value} breaks {word}: {says}"));
            }
        }
        Ok(())
    }

    fn alternatives(&self, schemas: &Value, value: &Value) -> usize {
        schemas
            .as_array()
            .unwrap()
            .iter()
            .filter(|schema| self.check(schema, value).is_ok())
            .count()
    }
}

fn is_of_type(types: &Value, value: &Value) -> bool {
    let one = |name: &Value| match name.as_str().unwrap() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        unknown => panic!("{unknown:?} is not a type"),
    };
    match types {
        Value::Array(types) => types.iter().any(one),
        name => one(name),
    }
}

/// The few patterns of the document, by what they mean.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    match pattern {
        "^[0-9A-Za-z-]*$" => text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'),
        "^(?!.*://).*$" => !text.contains("://"),
        "^[0-9A-Za-z_-]{1,64}$" => {
            (1..=64).contains(&text.len())
                && text
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
        }
        "^[^/:% ]{1,15}$" => (1..=15).contains(&text.len()) && !text.contains(['/', ':', '%', ' ']),
        "^([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}$" => {
            text.split(':').count() == 6
                && text
                    .split(':')
                    .all(|pair| pair.len() == 2 && pair.chars().all(|c| c.is_ascii_hexdigit()))
        }
        unknown => panic!("the pattern {unknown:?} is not known to this test"),
    }
}
