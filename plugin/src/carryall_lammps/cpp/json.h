// SPDX-License-Identifier: GPL-2.0-only
// As much of JSON as metadata.json and manifest.json need.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace carryall {

struct Json {
  enum Kind { NONE, BOOL, NUMBER, STRING, LIST, OBJECT } kind = NONE;
  bool truth = false;
  double number = 0;
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  // The value of a key, or none
  const Json &operator[](const std::string &key) const
  {
    static const Json none;
    const auto found = object.find(key);
    return found == object.end() ? none : found->second;
  }

  std::vector<std::string> strings() const
  {
    std::vector<std::string> out;
    for (const Json &one : list) out.push_back(one.text);
    return out;
  }
};

class JsonReader {
 public:
  explicit JsonReader(const std::string &text) : text_(text) {}

  Json read()
  {
    Json found = value(0);
    skip();
    if (place_ != text_.size()) fail();
    return found;
  }

 private:
  [[noreturn]] void fail() const { throw std::runtime_error("not valid JSON at byte " + std::to_string(place_)); }
  void skip()
  {
    while (place_ < text_.size() && std::string(" \t\r\n").find(text_[place_]) != std::string::npos) ++place_;
  }
  char next()
  {
    skip();
    if (place_ >= text_.size()) fail();
    return text_[place_];
  }
  bool take(char wanted)
  {
    if (next() != wanted) return false;
    ++place_;
    return true;
  }

  Json value(int depth)
  {
    if (depth > 100) fail();
    Json out;
    const char c = next();
    if (c == '"') {
      out.kind = Json::STRING;
      out.text = string();
    } else if (c == '[') {
      out.kind = Json::LIST;
      ++place_;
      if (take(']')) return out;
      do out.list.push_back(value(depth + 1));
      while (take(','));
      if (!take(']')) fail();
    } else if (c == '{') {
      out.kind = Json::OBJECT;
      ++place_;
      if (take('}')) return out;
      do {
        if (next() != '"') fail();
        const std::string key = string();
        if (!take(':') || out.object.count(key)) fail();
        out.object[key] = value(depth + 1);
      } while (take(','));
      if (!take('}')) fail();
    } else {
      const auto end = text_.find_first_of(",]} \t\r\n", place_);
      const std::string word = text_.substr(place_, end == std::string::npos ? end : end - place_);
      place_ += word.size();
      if (word == "true" || word == "false") {
        out.kind = Json::BOOL;
        out.truth = word == "true";
      } else if (word != "null") {
        char *stop = nullptr;
        out.kind = Json::NUMBER;
        out.number = std::strtod(word.c_str(), &stop);
        if (word.empty() || *stop) fail();
      }
    }
    return out;
  }

  std::string string()
  {
    std::string out;
    for (++place_; place_ < text_.size(); ++place_) {
      const char c = text_[place_];
      if (c == '"') return ++place_, out;
      if (c != '\\') {
        out += c;
        continue;
      }
      if (++place_ >= text_.size()) fail();
      const std::string codes = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
      const auto which = codes.find(text_[place_]);
      if (which != std::string::npos) {
        out += values[which];
      } else if (text_[place_] == 'u' && place_ + 4 < text_.size()) {
        // names that matter are ASCII; others only have to differ from them
        const long code = std::strtol(text_.substr(place_ + 1, 4).c_str(), nullptr, 16);
        out += code < 128 ? static_cast<char>(code) : '?';
        place_ += 4;
      } else {
        fail();
      }
    }
    fail();
  }

  const std::string &text_;
  size_t place_ = 0;
};

}    // namespace carryall
