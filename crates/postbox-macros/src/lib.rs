//! `#[derive(Message)]` for postbox. Use it through the `postbox` crate.

use proc_macro::TokenStream;
use quote::quote;
use syn::{Data, DeriveInput, Error, Fields, Ident, LitStr, parse_macro_input};

/// Derives `postbox::Message`.
///
/// `#[message(topic = "orders.placed", key = order_id)]`: both are optional. Without `topic` the
/// topic is the type's name in snake case; `key` names a field of a type that implements
/// `postbox::MessageKey` (strings, integers, uuids, options of them).
#[proc_macro_derive(Message, attributes(message))]
pub fn derive_message(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(Error::into_compile_error).into()
}

fn expand(input: &DeriveInput) -> syn::Result<proc_macro2::TokenStream> {
    let (mut topic, mut key): (Option<LitStr>, Option<Ident>) = (None, None);
    for attribute in input.attrs.iter().filter(|a| a.path().is_ident("message")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("topic") {
                topic = Some(meta.value()?.parse()?);
            } else if meta.path.is_ident("key") {
                key = Some(meta.value()?.parse()?);
            } else {
                return Err(meta.error("unknown option; there are `topic = \"orders.placed\"` and `key = field`"));
            }
            Ok(())
        })?;
    }
    let topic = match topic {
        Some(topic) => {
            check_topic(&topic)?;
            topic
        }
        None => LitStr::new(&snake_case(&input.ident.to_string()), input.ident.span()),
    };
    if let Some(key) = &key {
        check_field(input, key)?;
    }
    let key = key.map(|field| {
        quote! {
            fn key(&self) -> ::core::option::Option<::std::string::String> {
                ::postbox::MessageKey::message_key(&self.#field)
            }
        }
    });
    let name = &input.ident;
    let (impl_generics, type_generics, where_clause) = input.generics.split_for_impl();
    Ok(quote! {
        impl #impl_generics ::postbox::Message for #name #type_generics #where_clause {
            const TOPIC: &'static str = #topic;
            #key
        }
    })
}

fn check_topic(topic: &LitStr) -> syn::Result<()> {
    let text = topic.value();
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_-:/@+".contains(c);
    if text.len() > 255 || text.split('.').any(|s| s.is_empty() || !s.chars().all(allowed)) {
        return Err(Error::new(
            topic.span(),
            "a topic is a dotted name of non-empty segments, at most 255 bytes, like \"orders.placed\"",
        ));
    }
    Ok(())
}

fn check_field(input: &DeriveInput, key: &Ident) -> syn::Result<()> {
    let found = match &input.data {
        Data::Struct(data) => match &data.fields {
            Fields::Named(fields) => fields.named.iter().any(|f| f.ident.as_ref() == Some(key)),
            _ => false,
        },
        _ => false,
    };
    if found {
        return Ok(());
    }
    Err(Error::new(key.span(), format!("`{}` has no field `{key}` to take as the key", input.ident)))
}

fn snake_case(name: &str) -> String {
    let chars: Vec<char> = name.chars().collect();
    let mut snake = String::new();
    for (i, c) in chars.iter().enumerate() {
        let after_lower = i > 0 && (chars[i - 1].is_lowercase() || chars[i - 1].is_numeric());
        let ends_acronym = i > 0 && chars[i - 1].is_uppercase() && chars.get(i + 1).is_some_and(|n| n.is_lowercase());
        if c.is_uppercase() && (after_lower || ends_acronym) {
            snake.push('_');
        }
        snake.extend(c.to_lowercase());
    }
    snake
}

#[cfg(test)]
mod tests {
    #[test]
    fn snake_cases_as_people_read() {
        for (name, snake) in [
            ("OrderPlaced", "order_placed"),
            ("HTTPServerStarted", "http_server_started"),
            ("V2Order", "v2_order"),
            ("Order", "order"),
        ] {
            assert_eq!(super::snake_case(name), snake);
        }
    }
}
